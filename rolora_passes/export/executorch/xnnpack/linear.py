"""Linears for XNNPACK: plain, or int8 activations by int4 and int8 weights as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.executorch.xnnpack.emitter import DelegateEmitter
from rolora_passes.graphs.graph import argument, is_op, op_name
from rolora_passes.ondisk import rest


def linear(e: DelegateEmitter, node: fx.Node) -> int:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    quantized = is_op(x, "fake_quantize")
    return e.delegate.linear(
        e.value(x), _weight(e, weight, quantized), None if bias is None else e.value(bias)
    )


def _weight(e: DelegateEmitter, node: Any, quantized: bool) -> int:
    """The constant of a linear's weight, in the narrowest form its kernel takes."""
    form = kernel_form(node, quantized, e.tensor)
    if form is not None:
        stored, scale = e.tensor(node.args[0]), e.tensor(node.args[1])
        if form == "channel":
            found = e.delegate.channel_weight(stored, scale.flatten(), argument(node, "bits"))
        else:
            found = e.delegate.group_weight(stored, scale, stored.shape[1] // scale.shape[1])
        rest(stored)
        return found
    if quantized:
        raise LoweringError(
            f"`{node.name}`: XNNPACK multiplies int8 activations by symmetric weights of 4 bits with groups "
            f"of a multiple of 32, or of 4 or 8 bits with one scale for each row; found {_found(e, node)}"
        )
    return e.value(node)


def kernel_form(
    weight: Any, quantized: bool, tensor: Callable[[fx.Node], Tensor]
) -> Literal["channel", "group"] | None:
    """How a kernel reads a rounded weight as it is stored; None if none does: it is stored in float32 then.

    Args:
        quantized: whether the linear's input is rounded to int8.
        tensor: the value of a constant node.
    """
    if not is_op(weight, "dequantize") or weight.args[2] is not None:
        return None
    stored, scale, bits = tensor(weight.args[0]), tensor(weight.args[1]), argument(weight, "bits")
    if scale.shape[1] == 1 and bits in (4, 8):
        return "channel"
    grouped = quantized and bits == 4 and stored.shape[1] // scale.shape[1] % 32 == 0
    return "group" if grouped else None


def _found(e: DelegateEmitter, node: fx.Node) -> str:
    if not is_op(node, "dequantize"):
        return "weights in floating point" if node.op == "get_attr" else op_name(node)
    stored, scale = e.tensor(node.args[0]), e.tensor(node.args[1])
    kind = "symmetric" if node.args[2] is None else "with zero points"
    groups = f"groups of {stored.shape[1] // scale.shape[1]}" if scale.shape[1] > 1 else "per row"
    return f"{argument(node, 'bits')} bits {kind}, {groups}"


def fake_quantize(e: DelegateEmitter, node: fx.Node) -> int:
    """Dynamic int8 for each token: the one quantizer of activations that XNNPACK has."""
    known = {name: argument(node, name) for name in ("bits", "group_size", "symmetric", "clip")}
    if known != {"bits": 8, "group_size": None, "symmetric": False, "clip": 1.0}:
        raise LoweringError(
            f"`{node.name}`: XNNPACK quantizes activations to 8 bits, asymmetric, with one scale for each "
            f"token and no clip; found {known}"
        )
    if not all(is_op(user, "linear") for user in node.users):
        raise LoweringError(
            f"`{node.name}`: XNNPACK quantizes what linears read; found "
            f"{', '.join(op_name(u) for u in node.users)}"
        )
    return e.quantized(e.value(node.args[0]))
