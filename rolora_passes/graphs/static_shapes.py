"""Static shapes of a graph whose sequence length is dynamic, and constants of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

Shape = tuple[int | None, ...]
"""Sizes of one tensor; None where the size follows the sequence length."""

_PROBES = (7, 11)
_ASSERTIONS = (torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_constrain_range_for_size.default)


class _Propagate(fx.Interpreter):
    """Run a graph on meta tensors, noting the size and type of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[tuple[int, ...], torch.dtype]] = {}

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.item.default:
            return 1  # the start position is data; any value gives the same sizes
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = (tuple(result.shape), result.dtype)
        return result


def infer_shapes(
    graph: fx.GraphModule, inputs: Mapping[str, Shape]
) -> dict[fx.Node, tuple[Shape, torch.dtype]]:
    """Shape and type of the tensors of `graph`, found by running it on meta tensors of two lengths.

    A tensor with a size that is neither constant nor the length (twice the length, say) is left out.

    Args:
        inputs: for each placeholder, an int64 tensor's sizes, None for the sequence length.
    """
    runs = [_run(graph, inputs, length) for length in _PROBES]
    found: dict[fx.Node, tuple[Shape, torch.dtype]] = {}
    for node, (first, dtype) in runs[0].items():
        pairs = list(zip(first, runs[1][node][0], strict=True))
        if all(a == b or (a, b) == _PROBES for a, b in pairs):
            found[node] = (tuple(a if a == b else None for a, b in pairs), dtype)
    return found


def infer_symbols(
    graph: fx.GraphModule,
) -> dict[fx.Node, tuple[tuple[int | str | None, ...], torch.dtype]]:
    """Shape and type of the tensors of a graph whose batch is dynamic too, found by two runs on meta tensors.

    A size is a number, "batch", "length" (of tokens), the length of another input by its name
    ("decoder_tokens"), or None for what follows from these.
    """
    names = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
    lengths = {name: "length" if name in ("tokens", "positions") else name for name in names}
    symbols = ["batch", *dict.fromkeys(lengths.values())]
    known = [dict(zip(symbols, sizes, strict=False)) for sizes in ((2, 7, 11), (3, 13, 17))]
    runs = [_run(graph, {n: (sizes["batch"], sizes[lengths[n]]) for n in names}, 0) for sizes in known]
    meaning: dict[tuple[int, int], int | str] = {(known[0][s], known[1][s]): s for s in symbols}
    found = {}
    for node, (first, dtype) in runs[0].items():
        pairs = zip(first, runs[1][node][0], strict=True)
        found[node] = (tuple(a if a == b else meaning.get((a, b)) for a, b in pairs), dtype)
    return found


def _run(
    graph: fx.GraphModule, inputs: Mapping[str, Shape], length: int
) -> dict[fx.Node, tuple[tuple[int, ...], torch.dtype]]:
    interpreter = _Propagate(graph)
    with torch.no_grad():
        interpreter.run(
            *(
                torch.zeros(
                    [length if size is None else size for size in inputs[node.target]],
                    dtype=torch.int64,
                    device="meta",
                )
                for node in graph.graph.find_nodes(op="placeholder")
            )
        )
    return interpreter.found


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on parameters and numbers alone; a buffer that is written to is not one."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            if not is_written(node):
                found.add(node)
        elif node.op == "call_function" and found.issuperset(node.all_input_nodes):
            found |= {node} if node.all_input_nodes or _counts(node) else set()
    return found


def _counts(node: fx.Node) -> bool:
    """Whether a node without operands gives one tensor, always (arange(8), not rand(8))."""
    target = node.target
    seeded = torch.Tag.nondeterministic_seeded
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and seeded not in target.tags
    )


def is_written(node: fx.Node) -> bool:
    """Whether a node is a buffer that some operator writes to."""
    return node.op == "get_attr" and any(
        isinstance(user.target, torch._ops.OpOverload)
        and any(
            argument.alias_info is not None and argument.alias_info.is_write and given is node
            for argument, given in zip(user.target._schema.arguments, user.args, strict=False)
        )
        for user in node.users
    )


def written(graph: fx.Graph) -> list[str]:
    """The names of the buffers that some operator writes to: the state of a graph with caches."""
    return list(dict.fromkeys(str(n.target) for n in graph.nodes if is_written(n)))


def drop_unused(graph: fx.Graph) -> None:
    """Remove nodes nothing reads, except those with an effect: cache updates and assertions."""

    def has_effect(node: fx.Node) -> bool:
        target = node.target
        writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        return writes or target in _ASSERTIONS or node.is_impure()

    graph.eliminate_dead_code(is_impure_node=has_effect)
