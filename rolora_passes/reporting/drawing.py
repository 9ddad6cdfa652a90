"""A graph for viewers: nodes with their modules and descriptions, and figures to colour them by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.bases.inference import infer_bases
from rolora_passes.graphs.graph import KEPT, argument, is_op
from rolora_passes.graphs.layers import find_layers
from rolora_passes.graphs.shapes import BATCH, SEQUENCE, infer_shapes
from rolora_passes.inspection.structure import Words

Overlay = dict[str, float] | dict[str, str]


class Drawing:
    """A graph as a viewer shows it: only computation; weights are described on the nodes that read them."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.layers = find_layers(graph)
        self.shapes = infer_shapes(graph)
        self.words = Words(self.layers, self.shapes)
        computed = {n for nodes in self.layers.segments for n in nodes}
        self.nodes = [n for n in graph.graph.nodes if n in computed or n.op in ("placeholder", "output")]

    def module(self, node: fx.Node) -> str:
        """The dotted name of a node's module; "" for inputs and the output."""
        return self.words.modules.get(node, "")

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The values that a node reads, without weights."""
        return [a for a in node.all_input_nodes if a not in self.layers.weights]

    def read(self, node: fx.Node) -> list[fx.Node]:
        """The weights that a node reads."""
        return [a for a in node.all_input_nodes if a in self.layers.weights]

    def sizes(self, node: fx.Node) -> tuple[torch.dtype, list[int | str]] | None:
        """A value's dtype and sizes, with names for batch and sequence; None if it is not a tensor."""
        value = self.shapes.get(node)
        if not isinstance(value, torch.Tensor):
            return None
        names: dict[int, int | str] = {BATCH: "batch", SEQUENCE: "sequence"}
        return value.dtype, [names.get(size, size) for size in value.shape]

    def overlays(self, sqnr: Mapping[str, float] | None = None) -> dict[str, Overlay]:
        """Figures by node name: the bits of a weight, SQNR in dB, and the basis class of a value.

        Args:
            sqnr: SQNR of values by node name, as `track_errors` measures it.
        """
        names = {n.name for n in self.nodes}
        found: dict[str, Overlay] = {"bits": dict(self._bits()), "basis": dict(self._bases())}
        if sqnr is not None:
            found["sqnr"] = {name: round(value, 2) for name, value in sqnr.items() if name in names}
        return found

    def _bits(self) -> Iterator[tuple[str, float]]:
        for node in self.nodes:
            for weight in self.read(node) if is_op(node, "linear", "embedding") else ():
                if len(self.shapes[weight].shape) > 1:
                    yield node.name, float(self.width(weight))

    def width(self, weight: Any) -> int:
        """The bits per element of a weight."""
        return int(
            argument(weight, "bits") if is_op(weight, *KEPT) else self.shapes[weight].element_size() * 8
        )

    def _bases(self) -> Iterator[tuple[str, str]]:
        bases = infer_bases(self.graph)
        for node in self.nodes:
            factors = bases.of(node) if node.op == "call_function" else []
            if factors:
                cls = factors[-1][0]
                yield node.name, cls.kind + ("" if cls.free else ", rigid")
