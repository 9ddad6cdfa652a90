"""Quantizers of activations written out in standard operators: `graphs.affine`, step by step."""

from __future__ import annotations

import onnx_ir as ir
import torch

from rolora_passes.export.onnx.emitter import OnnxEmitter, Result
from rolora_passes.export.onnx.prepared import Node
from rolora_passes.graphs.graph import argument
from rolora_passes.numerics.affine import EPSILON, limits

_FLOAT = torch.float32


def fake_quantize(e: OnnxEmitter, node: Node) -> Result:
    """The grid of every token or group from its own range, then `_round_trip`; see `affine.fake_quantize`."""
    x, bits, group, symmetric, clip = (
        argument(node, n) for n in ("x", "bits", "group_size", "symmetric", "clip")
    )
    rank, width = e.rank(x), int(e.shape(x)[-1])
    value = e.value(x)
    if group not in (None, width):
        value = e.reshape(value, *[0] * (rank - 1), width // group, group)
    axes = e.integers(-1)
    low, high = (e.op(kind, value, axes, keepdims=1) for kind in ("ReduceMin", "ReduceMax"))
    low, high = (e.op(kind, bound, e.numbers(0.0, _FLOAT)) for kind, bound in (("Min", low), ("Max", high)))
    if clip != 1.0:
        low, high = (e.op("Mul", bound, e.numbers(float(clip), _FLOAT)) for bound in (low, high))
    scale, zero = _qparams(e, low, high, bits, symmetric)
    result = _round_trip(e, value, scale, zero, bits, symmetric)
    return result if group in (None, width) else e.reshape(result, *[0] * (rank - 1), width)


def _qparams(
    e: OnnxEmitter, low: ir.Value, high: ir.Value, bits: int, symmetric: bool
) -> tuple[ir.Value, ir.Value | None]:
    first, last = limits(bits, symmetric)
    range_ = e.op("Max", e.op("Neg", low), high) if symmetric else e.op("Sub", high, low)
    steps = e.numbers(float(last if symmetric else last - first), _FLOAT)
    scale = e.op("Max", e.op("Div", range_, steps), e.numbers(EPSILON, _FLOAT))
    if symmetric:
        return scale, None
    zero = e.op("Sub", e.numbers(float(first), _FLOAT), e.op("Round", e.op("Div", low, scale)))
    return scale, _clamp(e, zero, bits, symmetric)


def _round_trip(
    e: OnnxEmitter, x: ir.Value, scale: ir.Value, zero: ir.Value | None, bits: int, symmetric: bool
) -> ir.Value:
    steps = e.op("Round", e.op("Mul", x, e.op("Reciprocal", scale)))
    if zero is None:
        return e.op("Mul", _clamp(e, steps, bits, symmetric), scale)
    shifted = _clamp(e, e.op("Add", steps, zero), bits, symmetric)
    return e.op("Mul", e.op("Sub", shifted, zero), scale)


def _clamp(e: OnnxEmitter, x: ir.Value, bits: int, symmetric: bool) -> ir.Value:
    return e.op("Clip", x, *(e.numbers(float(n), _FLOAT) for n in limits(bits, symmetric)))


def fake_quantize_static(e: OnnxEmitter, node: Node) -> Result:
    x, scale, zero, bits, symmetric = (argument(node, n) for n in ("x", "scale", "zero", "bits", "symmetric"))
    shift = None if symmetric else e.op("Cast", e.value(zero), to=ir.DataType.FLOAT)
    return _round_trip(e, e.value(x), e.value(scale), shift, bits, symmetric)
