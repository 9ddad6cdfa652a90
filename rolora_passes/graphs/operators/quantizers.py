"""Quantizers: of weights, in two halves of which kernels read the second; of activations; and observers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.graphs.nodes import argument
from rolora_passes.graphs.operators.places import Place, Places, away_from, pointwise
from rolora_passes.graphs.operators.record import Call, Operator, Trait, Words, every_operand
from rolora_passes.graphs.operators.steps import AxisMap, still
from rolora_passes.numerics import affine, codebooks


def dequantize(integers: Tensor, scale: Tensor, zero: Tensor | None = None, bits: int = 8) -> Tensor:
    """s·(q - z): int8 [out, in], scale and zero point [out, groups] -> [out, in] in the scale's type.

    `bits` is what the integers need; it is there to be read, by kernels and by who counts bytes.
    """
    return affine.dequantize(integers, scale, zero)


def decode(codes: Tensor, scale: Tensor, table: Tensor, bits: int = 8) -> Tensor:
    """s·table[code]: uint8 [out, in], scale [out, groups] -> [out, in] in the scale's type."""
    return codebooks.decode(codes, scale, table)


def observed(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x itself, of which calibration has seen the range [low, high]: [1], or [channels] each.

    The ranges are parameters of the graph, for quantizers and SmoothQuant to read. To basis inference
    the operator is unknown, so nothing that would make the ranges wrong moves past it.
    """
    same: Tensor = torch.ops.aten.alias.default(x)
    return same


def _per_token(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    away_from(place, [i.rank(node.args[0]) - 1], "it rounds in groups")
    return place


# Words.


def _stored(words: Words, node: Call) -> str:
    """`4 bits in groups of 32`."""
    width, groups = (words.size(n) for n in node.args[:2])
    assert width and groups
    how = "a row" if groups == 1 else f"in groups of {width // groups}"
    return f"{argument(node, 'bits')} bits {how}"


def _dequantize_words(words: Words, node: Call) -> str:
    return _stored(words, node) + (", zero points" if node.args[2] is not None else "")


def _decode_words(words: Words, node: Call) -> str:
    return f"{_stored(words, node)} of {node.args[2].target}"


def _fake_quantize_words(words: Words, node: Call) -> str:
    group = argument(node, "group_size")
    one = "a token" if len(words.shape(node)) < 4 else "a head"
    return _rounding(node, one if group is None else f"in groups of {group}")


def _static_words(words: Words, node: Call) -> str:
    return _rounding(node, "static")


def _rounding(node: Call, how: str) -> str:
    clip = argument(node, "clip", 1.0)
    symmetric = " symmetric" if argument(node, "symmetric") else ""
    return f"fake_quantize {argument(node, 'bits')} bits {how}{symmetric}" + (
        f" clip {clip:g}" if clip != 1.0 else ""
    )


_STILL: dict[str, Any] = {"axis_map": AxisMap(still)}

WEIGHTS = (
    Operator(
        "rolora::choose_qparams",
        "(Tensor weight, int? group_size, int bits, bool symmetric=True, bool clip_search=False,"
        " bool bfloat16=False) -> (Tensor, Tensor)",
        affine.choose_qparams,
        by_row=every_operand,
        folded=("_scale", "_zero"),
    ),
    Operator(
        "rolora::quantize",
        "(Tensor weight, Tensor scale, Tensor zero, int bits, bool symmetric=True) -> Tensor",
        affine.quantize,
        **_STILL,
        by_row=every_operand,
        folded=("_q",),
        traits=Trait.QUANTIZES,
    ),
    Operator(
        "rolora::dequantize",
        "(Tensor integers, Tensor scale, Tensor? zero=None, int bits=8) -> Tensor",
        dequantize,
        **_STILL,
        by_row=every_operand,
        words=_dequantize_words,
        traits=Trait.KEPT | Trait.INSERTED,
    ),
    Operator(
        "rolora::absmax",
        "(Tensor weight, int? group_size) -> Tensor",
        codebooks.absmax,
        by_row=every_operand,
        folded=("_scale",),
    ),
    Operator(
        "rolora::encode",
        "(Tensor weight, Tensor scale, Tensor table) -> Tensor",
        codebooks.encode,
        **_STILL,
        by_row=every_operand,
        folded=("_q",),
        traits=Trait.QUANTIZES,
    ),
    Operator(
        "rolora::decode",
        "(Tensor codes, Tensor scale, Tensor table, int bits=8) -> Tensor",
        decode,
        **_STILL,
        by_row=every_operand,
        words=_decode_words,
        traits=Trait.KEPT | Trait.INSERTED,
    ),
)
ACTIVATIONS = (
    Operator(
        "rolora::fake_quantize",
        "(Tensor x, int bits, int? group_size=None, bool symmetric=False, float clip=1.0) -> Tensor",
        affine.fake_quantize,
        positions=_per_token,
        words=_fake_quantize_words,
        traits=Trait.FAKE_QUANTIZES | Trait.INSERTED,
    ),
    Operator(
        "rolora::fake_quantize_static",
        "(Tensor x, Tensor scale, Tensor zero, int bits, bool symmetric=False) -> Tensor",
        affine.fake_quantize_static,
        positions=pointwise,
        words=_static_words,
        traits=Trait.FAKE_QUANTIZES | Trait.INSERTED,
    ),
    Operator(
        "rolora::observed",
        "(Tensor x, Tensor low, Tensor high) -> Tensor",
        observed,
        positions=pointwise,
        traits=Trait.INSERTED,
    ),
)
OPERATORS = (*WEIGHTS, *ACTIVATIONS)
