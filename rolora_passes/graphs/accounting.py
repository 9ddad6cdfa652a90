"""What a graph's weights weigh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from rolora_passes.graphs.graph import get_tensor, is_op, parameters

_DEQUANTIZE = ("dequantize_per_channel_group", "dequantize_per_channel")


@dataclass(frozen=True)
class Weights:
    """Sizes of a graph's parameters.

    Attributes:
        elements: number of weights; scales are not weights.
        bits: stored for them, scales included (bfloat16 for groups, float32 per channel).
        by_bits: number of weights by their width.
    """

    elements: int
    bits: int
    by_bits: dict[int, int]

    @property
    def bits_per_weight(self) -> float:
        return self.bits / self.elements

    @property
    def megabytes(self) -> float:
        return self.bits / 8e6


def weigh(graph: fx.GraphModule) -> Weights:
    """Count a graph's weights and the bits that store them; a shared tensor counts once."""
    width: dict[int, int] = {}
    scales: dict[int, int] = {}
    for node in graph.graph.nodes:
        if is_op(node, *_DEQUANTIZE) and all(a.op == "get_attr" for a in node.args[:2]):
            grouped = is_op(node, "dequantize_per_channel_group")
            low, high = node.args[3:5] if grouped else node.args[4:6]
            width[id(get_tensor(graph, node.args[0].target))] = (high - low).bit_length()
            scales[id(get_tensor(graph, node.args[1].target))] = 16 if grouped else 32
    by_bits: dict[int, int] = {}
    extra = 0
    for tensor in {id(t): t for t in parameters(graph).values()}.values():
        if id(tensor) in scales:
            extra += tensor.numel() * scales[id(tensor)]
        elif tensor.is_floating_point() or tensor.dtype == torch.int8:
            bits = width.get(id(tensor), tensor.element_size() * 8)
            by_bits[bits] = by_bits.get(bits, 0) + tensor.numel()
    elements = sum(by_bits.values())
    return Weights(elements, sum(b * n for b, n in by_bits.items()) + extra, dict(sorted(by_bits.items())))
