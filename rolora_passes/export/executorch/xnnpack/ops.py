"""How each operator of the canonical form becomes nodes of an XNNPACK delegate.

One function for each operator, in the table `EMITTERS`; whatever is not in the table, or does not pass
`supported`, is left to ExecuTorch's own kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_INVALID_VALUE_ID
from torch import fx

from rolora_passes.export.executorch.xnnpack.emitter import DelegateEmitter, Typed, op_key
from rolora_passes.export.executorch.xnnpack.hadamard import hadamard, kronecker
from rolora_passes.export.executorch.xnnpack.linear import fake_quantize, linear
from rolora_passes.graphs.graph import argument, is_op
from rolora_passes.graphs.shapes import Shape


def supported(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    """Whether a delegate may hold this node."""
    key = op_key(node)
    if key not in EMITTERS or shapes.get(node, ((), None))[1] is not torch.float32:
        return False
    inputs = [n for n in node.all_input_nodes if n not in constant and n in shapes]
    if key not in _RESHAPES and not all(n in constant or n in shapes for n in node.all_input_nodes):
        return False  # a size computed at run time; of a reshape the result's shape says enough
    if any(shapes[n][1] is not torch.float32 or len(shapes[n][0]) > 6 for n in inputs) or not inputs:
        return False
    check = _CONDITIONS.get(key)
    return check is None or check(node, shapes, constant)


def _unary(kind: str) -> Callable[[DelegateEmitter, fx.Node], int]:
    return lambda e, n: e.delegate.node(kind, e.shape(n), input_id=e.value(n.args[0]))


def _binary(kind: str) -> Callable[[DelegateEmitter, fx.Node], int]:
    def emit(e: DelegateEmitter, node: fx.Node) -> int:
        left, right = e.value(node.args[0]), e.value(node.args[1])
        alpha = argument(node, "alpha", 1)
        if alpha != 1:
            right = multiply(e, right, e.value(alpha), e.delegate.shapes[right])
        return e.delegate.node(kind, e.shape(node), input1_id=left, input2_id=right)

    return emit


def multiply(e: DelegateEmitter, left: int, right: int, shape: Shape) -> int:
    return e.delegate.node("Multiply", shape, input1_id=left, input2_id=right)


def add(e: DelegateEmitter, left: int, right: int, shape: Shape) -> int:
    return e.delegate.node("Add", shape, input1_id=left, input2_id=right)


def _silu(e: DelegateEmitter, node: fx.Node) -> int:
    x = e.value(node.args[0])
    gate = e.delegate.node("Sigmoid", e.shape(node), input_id=x)
    return multiply(e, x, gate, e.shape(node))


def _relu(e: DelegateEmitter, node: fx.Node) -> int:
    return e.delegate.node("Clamp", e.shape(node), minimum=0.0, input_id=e.value(node.args[0]))


def _pow(e: DelegateEmitter, node: fx.Node) -> int:
    x, shape = e.value(node.args[0]), e.shape(node)
    square = e.delegate.node("Square", shape, input_id=x)
    return square if node.args[1] == 2 else multiply(e, square, x, shape)


def _gelu(e: DelegateEmitter, node: fx.Node) -> int:
    """XNNPACK's gelu is the exact one; tanh's is x / (1 + exp(-2 inner)) = x * sigmoid(2 inner)."""
    x, shape = e.value(node.args[0]), e.shape(node)
    if argument(node, "approximate") == "none":
        return e.delegate.node("Gelu", shape, input_id=x)
    factor = 2 * math.sqrt(2 / math.pi)
    cubic = multiply(e, e.delegate.node("Square", shape, input_id=x), e.value(factor * 0.044715), shape)
    inner = multiply(e, add(e, cubic, e.value(factor), shape), x, shape)
    return multiply(e, x, e.delegate.node("Sigmoid", shape, input_id=inner), shape)


def _mean(e: DelegateEmitter, x: int, epsilon: float | None = None) -> int:
    """Mean over the last axis, [.., d] -> [.., 1], as a linear: the delegate has no mean of its own."""
    width = e.delegate.shapes[x][-1]
    assert width is not None
    weight = e.delegate.constant(torch.full((1, width), 1 / width))
    return e.delegate.linear(x, weight, None if epsilon is None else e.value(epsilon))


def _normalize(e: DelegateEmitter, x: int, node: fx.Node, epsilon: float) -> int:
    """x / sqrt(mean(x²) + eps), times the weight and plus the bias where the node has them."""
    shape = e.shape(node)
    power = _mean(e, e.delegate.node("Square", shape, input_id=x), epsilon)
    inverse = e.delegate.node("ReciprocalSquareRoot", e.delegate.shapes[power], input_id=power)
    out = multiply(e, x, inverse, shape)
    gain, bias = argument(node, "weight"), argument(node, "bias")
    out = out if gain is None else multiply(e, out, e.value(gain), shape)
    return out if bias is None else add(e, out, e.value(bias), shape)


def _rms_norm(e: DelegateEmitter, node: fx.Node) -> int:
    epsilon = argument(node, "eps")
    epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    return _normalize(e, e.value(node.args[0]), node, epsilon)


def _layer_norm(e: DelegateEmitter, node: fx.Node) -> int:
    x, shape = e.value(node.args[0]), e.shape(node)
    centred = e.delegate.node("Subtract", shape, input1_id=x, input2_id=_mean(e, x))
    return _normalize(e, centred, node, argument(node, "eps"))


def _reshape(e: DelegateEmitter, node: fx.Node) -> int:
    return e.delegate.reshape(e.value(node.args[0]), e.shape(node))


def _permute(e: DelegateEmitter, node: fx.Node) -> int:
    rank = len(e.shape(node))
    if is_op(node, "transpose"):
        order = list(range(rank))
        first, second = (argument(node, name) % rank for name in ("dim0", "dim1"))
        order[first], order[second] = second, first
    else:
        order = [d % rank for d in argument(node, "dims")]
    return e.delegate.permute(e.value(node.args[0]), order)


def _matmul(e: DelegateEmitter, node: fx.Node) -> int:
    return e.delegate.matmul(e.value(node.args[0]), e.value(node.args[1]), e.shape(node))


def _cat(e: DelegateEmitter, node: fx.Node) -> int:
    parts = [e.value(p) for p in node.args[0]]  # type: ignore[union-attr]
    axis = int(argument(node, "dim")) % len(e.shape(node))
    return concatenate(e, parts, axis, e.shape(node))


def concatenate(e: DelegateEmitter, parts: Sequence[int], axis: int, shape: Shape) -> int:
    fields: dict[str, Any] = {f"input{i}_id": XNN_INVALID_VALUE_ID for i in range(1, 6)}
    fields.update({f"input{i}_id": part for i, part in enumerate(parts, 1)})
    return e.delegate.node(f"Concatenate{len(parts)}", shape, axis=axis, **fields)


def _slice(e: DelegateEmitter, node: fx.Node) -> int:
    x, shape = e.value(node.args[0]), e.shape(node)
    dim = int(argument(node, "dim")) % len(shape)
    size = e.delegate.shapes[x][dim]
    assert size is not None
    start = int(argument(node, "start") or 0)
    return narrow(e, x, dim, min(start, size) % max(size, 1) if start < 0 else start, shape)


def narrow(e: DelegateEmitter, x: int, dim: int, start: int, shape: Shape) -> int:
    offsets = [start if d == dim else 0 for d in range(len(shape))]
    sizes = [0 if d is None else d for d in shape]
    return e.delegate.node(
        "StaticSlice", shape, num_dims=len(shape), offsets=offsets, sizes=sizes, input_id=x
    )


def _same(e: DelegateEmitter, node: fx.Node) -> int:
    return e.value(node.args[0])


def _constant_weight(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    return node.args[1] in constant and node.args[0] not in constant


def _one_unknown(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    return sum(d is None for d in shapes[node][0]) <= 1


def _last_axis(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    """Norms over one axis; softmax over the last."""
    if is_op(node, "softmax", "_softmax"):
        return node.args[1] in (-1, len(shapes[node][0]) - 1)
    return len(argument(node, "normalized_shape")) == 1


def _small_power(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    return node.args[1] in (2, 3)


def _few_parts(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    return 2 <= len(node.args[0]) <= 5  # type: ignore[arg-type]


def _static_slice(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    source = shapes[node.args[0]][0]  # type: ignore[index]
    dim = int(argument(node, "dim")) % len(source)
    return source[dim] is not None and argument(node, "step") == 1


def _float_numbers(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    return all(isinstance(a, fx.Node | int | float) for a in node.args[:2])


_RESHAPES = tuple(f"aten.{name}" for name in ("view", "reshape", "unflatten", "flatten", "unsqueeze"))

_CONDITIONS: dict[str, Callable[[fx.Node, dict[fx.Node, Typed], set[fx.Node]], bool]] = {
    "aten.linear": _constant_weight,
    "aten.rms_norm": _last_axis,
    "aten.layer_norm": _last_axis,
    "aten.softmax": _last_axis,
    "aten.pow": _small_power,
    "aten.cat": _few_parts,
    "aten.slice": _static_slice,
    **dict.fromkeys(_RESHAPES, _one_unknown),
    **{f"aten.{name}": _float_numbers for name in ("add", "sub", "mul", "div")},
}

EMITTERS: dict[str, Callable[[DelegateEmitter, fx.Node], int]] = {
    "aten.linear": linear,
    "aten.rms_norm": _rms_norm,
    "aten.layer_norm": _layer_norm,
    "aten.silu": _silu,
    "aten.gelu": _gelu,
    "aten.pow": _pow,
    "aten.relu": _relu,
    "aten.sigmoid": _unary("Sigmoid"),
    "aten.tanh": _unary("Tanh"),
    "aten.exp": _unary("Exp"),
    "aten.neg": _unary("Negate"),
    "aten.square": _unary("Square"),
    "aten.rsqrt": _unary("ReciprocalSquareRoot"),
    "aten.softmax": _unary("Softmax"),
    "aten.add": _binary("Add"),
    "aten.sub": _binary("Subtract"),
    "aten.mul": _binary("Multiply"),
    "aten.div": _binary("Div"),
    "aten.matmul": _matmul,
    "aten.cat": _cat,
    "aten.slice": _slice,
    "aten.permute": _permute,
    "aten.transpose": _permute,
    **dict.fromkeys(_RESHAPES, _reshape),
    "rolora.fake_quantize": fake_quantize,
    "rolora.hadamard": hadamard,
    "rolora.kronecker": kronecker,
}
