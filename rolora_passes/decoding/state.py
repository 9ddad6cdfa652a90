"""Which operators of a decoder mix positions: attention has a cache for that; others would need a state.

A program computes a few tokens at a time. What it computes of a token may depend on that token, on its
position, and on others through attention, whose keys and values are kept. An operator that reads other
positions in another way (a convolution, a running sum, a shift, a mean over the sequence) would find
nothing in their place.

The analysis follows the axis along which positions run through every value. A value is *by position* if its
slice at a position is computed from slices at that position alone. `Operator.positions` says
when that is so; what has no rule is taken to mix.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rolora_passes.decoding.positions import position_only
from rolora_passes.errors import LoweringError
from rolora_passes.graphs.buffers import constant_nodes
from rolora_passes.graphs.operators import operator_of
from rolora_passes.graphs.operators.places import Mixes, Place, Places, pointwise
from rolora_passes.graphs.shapes import SEQUENCE, infer_shapes
from rolora_passes.graphs.sources import source_of


def require_state(graph: fx.GraphModule) -> None:
    """Refuse a decoder, forward(tokens, positions), in which others than attention mix positions.

    Raises:
        LoweringError: names them, and the lines of the model that they come from.
    """
    found = mixing(graph)
    if found:
        lines = "\n".join(
            f"  `{node.name}` ({node.target}){source_of(node)}: {why}" for node, why in found.items()
        )
        raise LoweringError(
            f"{len(found)} operators mix positions, or count them, and have no state in a cache, as "
            "attention has: decoding token by token would give other logits, so the model cannot be lowered "
            "with a cache:\n"
            f"{lines}"
        )


def mixing(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """The first operators on every path that mix positions, with how; what reads them is not judged."""
    return _Inference(graph).run()


class _Inference(Places):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(infer_shapes(graph))
        self.graph, self.constant = graph, constant_nodes(graph.graph)

    def run(self) -> dict[fx.Node, str]:
        found: dict[fx.Node, str] = {}
        unknown: set[fx.Node] = set()
        _, positions = self.graph.graph.find_nodes(op="placeholder")
        tabled = position_only(self.graph.graph, positions)  # `tabulate` looks at what these give
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.places[node] = Place(1, 1, 1)
            elif node.op != "call_function" or node in self.constant:
                continue
            elif any(n in unknown for n in node.all_input_nodes):
                unknown.add(node)
            elif node in tabled:
                self.places[node] = self._of_table(node)
            else:
                try:
                    self.places[node] = self._place(node)
                except Mixes as mixes:
                    found[node] = str(mixes)
                    unknown.add(node)
        return found

    def _of_table(self, node: fx.Node) -> Place | None:
        shape = self.shape(node)
        dims = [d for d, size in enumerate(shape) if size == SEQUENCE]
        return Place(dims[0], 1, 1) if dims else None

    def _place(self, node: fx.Node) -> Place | None:
        if self.values.get(node) is None:
            raise Mixes("its shape is not known")
        if not isinstance(self.values[node], Tensor | tuple | list):
            return None  # a size: what is done with it is judged where it is read
        known = operator_of(node)
        rule = known.positions if known is not None else None
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = pointwise
        if rule is None:
            if not any(self.place(n) for n in node.all_input_nodes) and not self._sized(node):
                return None
            raise Mixes("no rule says that it works position by position")
        return rule(self, node)

    def _sized(self, node: fx.Node) -> bool:
        return any(not isinstance(self.values.get(n), Tensor) for n in node.all_input_nodes)
