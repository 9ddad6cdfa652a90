"""What a graph's weights weigh, and which of its parameters no quantizer reaches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rolora_passes.graphs.graph import (
    argument,
    constants,
    get_tensor,
    is_op,
    linears,
    op_name,
    parameters,
    upstream,
)
from rolora_passes.graphs.operators import Trait, has


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
    extra: dict[int, int] = {}  # what goes with the weights: scales, zero points, tables
    for node in graph.graph.nodes:
        if has(node, Trait.KEPT) and all(a.op == "get_attr" for a in node.args[:2]):
            bits = argument(node, "bits")
            width[id(get_tensor(graph, node.args[0].target))] = bits
            scale = get_tensor(graph, node.args[1].target)
            extra[id(scale)] = 16 if scale.shape[-1] > 1 else 32
            if is_op(node, "dequantize") and node.args[2] is not None:
                extra[id(get_tensor(graph, node.args[2].target))] = bits
            elif is_op(node, "decode"):
                extra[id(get_tensor(graph, node.args[2].target))] = 32
    by_bits: dict[int, int] = {}
    beside = 0
    for tensor in {id(t): t for t in parameters(graph).values()}.values():
        if id(tensor) in extra:
            beside += tensor.numel() * extra[id(tensor)]
        elif tensor.is_floating_point() or tensor.dtype in (torch.int8, torch.uint8):
            bits = width.get(id(tensor), tensor.element_size() * 8)
            by_bits[bits] = by_bits.get(bits, 0) + tensor.numel()
    elements = sum(by_bits.values())
    return Weights(elements, sum(b * n for b, n in by_bits.items()) + beside, dict(sorted(by_bits.items())))


def remaining(graph: fx.GraphModule) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """What quantizers of linears' weights do not reach.

    Returns: every matrix (two axes or more) of floating-point numbers that is no linear's, with the reason
        that it stays; and how many vectors there are ("parameters", "elements"): gains, biases, frequencies.
    """
    known, sites = constants(graph), linears(graph)
    reached = upstream(n.args[1] for n in sites if isinstance(n.args[1], fx.Node))
    matrices, vectors = dict[str, str](), dict[str, int]()
    for node in graph.graph.find_nodes(op="get_attr"):
        value, readers = get_tensor(graph, str(node.target)), _readers(node, known)
        if not value.is_floating_point() or node in reached:
            continue
        if value.dim() > 1:
            matrices[str(node.target)] = _why_it_stays(value, readers)
        elif not any(has(user, Trait.KEPT) for user in node.users):
            vectors[str(node.target)] = value.numel()
    return list(matrices.items()), {"parameters": len(vectors), "elements": sum(vectors.values())}


def _readers(node: fx.Node, known: Collection[fx.Node]) -> list[fx.Node]:
    """What computes with a parameter, or with what is made of it alone; a quantizer's second half, too."""
    found, stack = dict[fx.Node, None](), list(node.users)
    while stack:
        user = stack.pop()
        found |= {} if user in known else {user: None}
        stack.extend(user.users if user in known else [])
    return list(found)


def _why_it_stays(value: Tensor, readers: Sequence[fx.Node]) -> str:
    names = ", ".join(sorted({op_name(reader) for reader in readers}))
    if any(has(reader, Trait.KEPT) for reader in readers):
        return "quantized already"
    if any(is_op(reader, "embedding") for reader in readers):
        return "a table that an embedding reads: quantize-embedding rounds it"
    if value.dim() == 3 and any(is_op(reader, "index", "bmm", "matmul", "einsum") for reader in readers):
        return f"{len(value)} matrices in one, as experts are, read by {names}, not as a linear's weight"
    return f"read by {names}, not as a linear's weight"
