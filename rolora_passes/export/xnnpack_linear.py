"""Linears for XNNPACK: plain, or int8 activations by int4 and int8 weights as they are stored."""

from __future__ import annotations

from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.xnnpack_emitter import Emitter, op_key
from rolora_passes.graphs.graph import argument, is_op

QUANTIZER = {
    "quantized_decomposed.choose_qparams_per_token_asymmetric",
    "getitem choose_qparams_per_token_asymmetric",
    "quantized_decomposed.quantize_per_token",
    "quantized_decomposed.dequantize_per_token",
}
"""The parts of a dynamic quantizer, all of them one conversion in a delegate."""


def linear(e: Emitter, node: fx.Node) -> int:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    quantized = op_key(x) in QUANTIZER
    return e.delegate.linear(
        e.value(x), _weight(e, weight, quantized), None if bias is None else e.value(bias)
    )


def _weight(e: Emitter, node: fx.Node, quantized: bool) -> int:
    """The constant of a linear's weight, in the narrowest form its kernel takes."""
    if is_op(node, "dequantize_per_channel_group", "dequantize_per_channel"):
        stored = e.tensor(node.args[0])
        scale = e.tensor(node.args[1]).reshape(stored.shape[0], -1)
        limits = (argument(node, "quant_min"), argument(node, "quant_max"))
        _check_symmetric(e, node)
        if scale.shape[1] == 1 and is_op(node, "dequantize_per_channel"):
            return e.delegate.channel_weight(stored, scale.flatten(), 4 if limits == (-8, 7) else 8)
        group = stored.shape[1] // scale.shape[1]
        if quantized and limits == (-8, 7) and group % 32 == 0:
            return e.delegate.group_weight(stored, scale, group)
        if scale.shape[1] == 1 and limits != (-8, 7):
            return e.delegate.channel_weight(stored, scale.flatten(), 8)
    if quantized:
        raise LoweringError(
            f"`{node.name}`: XNNPACK multiplies int8 activations by int4 weights in [-8, 7] with groups of a "
            f"multiple of 32, or by int4 or int8 weights with one scale for each row; found {node.target} "
            f"with {node.args[2:]}"
        )
    return e.value(node)


def _check_symmetric(e: Emitter, node: fx.Node) -> None:
    zero = node.args[2]
    if isinstance(zero, fx.Node) and bool(e.tensor(zero).count_nonzero()):
        raise LoweringError(f"`{node.name}`: XNNPACK weights are symmetric, found non-zero zero points")


def quantize(e: Emitter, node: fx.Node) -> int:
    return e.quantized(e.value(node.args[0]))
