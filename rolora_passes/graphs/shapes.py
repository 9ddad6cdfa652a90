"""Shapes recorded by capture, compared without adding guards; and shapes computed afterwards."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.inputs import BATCH as BATCH
from rolora_passes.graphs.inputs import DECODER_SEQUENCE as DECODER_SEQUENCE
from rolora_passes.graphs.inputs import SEQUENCE as SEQUENCE
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.operators import operator_of


def shape_of(node: object) -> Any:
    """A node's shape: ints, strings for symbolic sizes; None where capture recorded no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def same_shape(first: fx.Node, second: fx.Node) -> bool:
    """Whether two nodes have the same known shape."""
    return shape_of(first) is not None and shape_of(first) == shape_of(second)


class _Shapes(fx.Interpreter):
    """Runs a graph on meta tensors; a value whose shape cannot be known becomes None."""

    only: Collection[fx.Node] | None = None

    def run_node(self, n: fx.Node) -> Any:
        if self.only is not None and n not in self.only:
            return None
        try:
            return super().run_node(n)
        except Exception:  # an operator without a shape rule, or fed by one: its value is unknown
            return None

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = operator_of(target)
        if known is not None and known.result is not None:  # tracing what it is made of would take longer
            return known.result(*args, **kwargs)
        meta = torch.device("meta")
        if "device" in kwargs:
            kwargs = {**kwargs, "device": meta}
        args = tuple(meta if isinstance(a, torch.device) else a for a in args)
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        return torch.empty_like(value, device="meta")


def infer_shapes(graph: fx.GraphModule, only: Collection[fx.Node] | None = None) -> dict[fx.Node, Any]:
    """Meta tensors (shape and dtype) for every node at batch `BATCH`, sequence `SEQUENCE` (a decoder's own:
    `DECODER_SEQUENCE`).

    None for a value that no shape rule covers, and for nodes outside `only` (say, the constant ones)
    where it is given. Nothing is computed.
    """
    shapes = _Shapes(graph, garbage_collect_values=False)
    shapes.only = only
    tokens, decoder_tokens = (
        torch.empty(BATCH, length, dtype=torch.int64, device="meta")
        for length in (SEQUENCE, DECODER_SEQUENCE)
    )
    with torch.no_grad():
        shapes.run(*inputs_for(graph, tokens, decoder_tokens).values())
    return dict(shapes.env)
