"""Quantized weights in the layouts of ONNX kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.prepared import Node, Prepared, Reads
from rolora_passes.graphs.graph import KEPT, argument, is_op
from rolora_passes.numerics.packing import pack_nibbles

KERNEL_BITS = (4, 8)
_SMALLEST, _LARGEST = 16, 256  # groups that MatMulNBits has: powers of two between these


@dataclass(frozen=True)
class KernelWeight:
    """A weight [out, in] as integers and what dequantizes them.

    Attributes:
        integers: int8 [out, in].
        scale: float32 [out, groups].
        zero: int8 [out, groups]; None if all are 0.
        bits: the width that the integers need.
    """

    name: str
    integers: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        return int(self.integers.shape[1]) // int(self.scale.shape[1])

    @property
    def stored_bits(self) -> int:
        """The narrowest width that kernels have and the integers fit."""
        return next(width for width in KERNEL_BITS if self.bits <= width)


def quantized_weight(graph: Prepared, node: Node) -> KernelWeight | None:
    """The weight that a `rolora::dequantize` stands for; None for any other node.

    Raises:
        LoweringError: codes of a codebook, which no kernel here reads.
    """
    if is_op(node, "decode"):
        raise LoweringError(
            "expected weights on a uniform grid, which the kernels read, found codes of a codebook, "
            f"{node.args[2].target}: quantize onto the grid int, or lower it in floating point"
        )
    if not is_op(node, "dequantize"):
        return None
    tensors = [None if a is None else graph.parameter(a) for a in (*node.args, None)[:3]]
    integers, scale, zero = tensors
    assert integers is not None and scale is not None
    return KernelWeight(str(node.args[0].target), integers, scale.float(), zero, argument(node, "bits"))


def kernel_groups(weight: KernelWeight) -> tuple[int, int]:
    """(block, repeat): groups of `block` as the kernel has them, in which each scale stands `repeat` times.

    A scale for a whole row is repeated in blocks of 128 (or the power of two above a narrower row), of
    which the last may be filled up.

    Raises:
        LoweringError: no power of two from 16 on divides the group.
    """
    group, width = weight.group_size, int(weight.integers.shape[1])
    if group == width:
        block = min(128, max(_SMALLEST, 1 << (width - 1).bit_length()))
        return block, -(-width // block)
    block = min(group & -group, _LARGEST)
    if block < _SMALLEST:
        raise LoweringError(
            f"{weight.name}: expected groups of 16, 32, 64, 128 or 256, or multiples of these, or one scale "
            f"per row, which the kernels have; found groups of {group}"
        )
    return block, group // block


def blocks(weight: KernelWeight, block: int, repeat: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(integers uint8 [out, n, block] packed along the last axis, scales [out, n], zero points packed).

    Low bits first; integers and zero points are shifted by half their range, which is what a kernel takes
    for a zero point where it is given none.
    """
    bits, half = weight.stored_bits, 1 << (weight.stored_bits - 1)
    rows, width = weight.integers.shape
    count = -(-width // block)
    filled = weight.integers if width == count * block else F.pad(weight.integers, (0, count * block - width))
    packed = _pack(filled.reshape(rows, count, block), bits)
    scale = weight.scale.repeat_interleave(repeat, 1).contiguous()
    if weight.zero is None:
        return packed, scale, None
    zero = F.pad(weight.zero.repeat_interleave(repeat, 1), (0, -count % (8 // bits)), value=-half)
    return packed, scale, _pack(zero, bits)


def _pack(values: Tensor, bits: int) -> Tensor:
    """int8 [.., n] of 4 or 8 bits -> uint8 [.., n·bits / 8]: shifted by half the range, the first lowest."""
    # Adding half of the range turns over the highest bit.
    return pack_nibbles(values).bitwise_xor_(0x88) if bits == 4 else values.view(torch.uint8) ^ 0x80


def pack_signed(integers: Tensor) -> Tensor:
    """int8 in [-8, 7], any shape -> the bytes of ONNX's INT4, two in each, the first in the low half."""
    return pack_nibbles(integers.reshape(-1))


def kernel_input(graph: Prepared, linear: Node) -> tuple[Node, int]:
    """What a linear with quantized weights reads, and the accuracy level of its product.

    Level 4 is the kernel's own rounding of activations to 8 bits, in place of the graph's; 0 leaves them.
    """
    x, level, rounded = linear.args[0], graph.accuracy_level, _in_8_bits(linear)
    if level is None:
        level = 4 if rounded else 0
    return (x.args[0] if rounded and level == 4 else x), level


def linear_reads(graph: Prepared, node: Node) -> list[Node]:
    """The input and the bias; a weight on a grid goes into the product as it is stored."""
    x, weight, bias = node.args[0], node.args[1], argument(node, "bias")
    given = [kernel_input(graph, node)[0], bias] if is_op(weight, *KEPT) else [x, weight, bias]
    return [n for n in given if n is not None]


def embedding_reads(graph: Prepared, node: Node) -> list[Node]:
    """The tokens; a table on a grid is looked up as it is stored."""
    table, tokens = node.args[:2]
    return [tokens] if is_op(table, *KEPT) else [table, tokens]


READS: dict[str, Reads] = {"linear": linear_reads, "embedding": embedding_reads}


def common_level(graph: fx.GraphModule, level: int | None) -> int | None:
    """The level for a runtime that has one for all products: 0 where the graph rounds for some alone."""
    products = [n for n in graph.graph.nodes if is_op(n, "linear") and is_op(n.args[1], *KEPT)]
    return 0 if level is None and len({_in_8_bits(n) for n in products}) > 1 else level


def _in_8_bits(linear: Node) -> bool:
    return is_op(linear.args[0], "fake_quantize") and argument(linear.args[0], "bits") == 8
