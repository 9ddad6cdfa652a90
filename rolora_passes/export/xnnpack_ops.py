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
from torch import Tensor, fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.shapes import Shape
from rolora_passes.export.xnnpack_graph import Delegate
from rolora_passes.graphs.graph import argument, get_tensor, is_op, op_name

Typed = tuple[Shape, torch.dtype]


class Emitter:
    """The state of one delegate's emission: which value stands for which node."""

    def __init__(self, module: fx.GraphModule, shapes: dict[fx.Node, Typed]) -> None:
        self.module, self.shapes = module, shapes
        self.delegate = Delegate()
        self.values: dict[fx.Node, int] = {}
        self._quantized: dict[int, int] = {}

    def emit(self, node: fx.Node) -> None:
        """Add one supported node."""
        self.values[node] = EMITTERS[op_key(node)](self, node)

    def value(self, item: Any) -> int:
        """The value of a node, a parameter or a number."""
        if not isinstance(item, fx.Node):
            return self.delegate.constant(torch.tensor([float(item)]))
        if item not in self.values:
            self.values[item] = self.delegate.constant(self.tensor(item))
        return self.values[item]

    def tensor(self, node: fx.Node) -> Tensor:
        """A parameter, dequantized if it is stored quantized."""
        if node.op == "get_attr":
            return get_tensor(self.module, str(node.target))
        arguments = [self.tensor(a) if isinstance(a, fx.Node) else a for a in node.args]
        with torch.no_grad():
            result: Tensor = node.target(*arguments, **node.kwargs)  # type: ignore[operator]
        return result

    def shape(self, node: fx.Node) -> Shape:
        return self.shapes[node][0]

    def quantized(self, value: int) -> int:
        """Dynamic int8 of a value; linears that read one value share it."""
        if value not in self._quantized:
            self._quantized[value] = self.delegate.quantize_rows(value)
        return self._quantized[value]


def op_key(node: fx.Node) -> str:
    """`aten.linear` for any overload of aten's linear; `getitem ..` of an operator; else the empty string."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return f"getitem {op_name(node.args[0])}" if is_op(node, "getitem") else ""  # type: ignore[arg-type]


def supported(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    """Whether a delegate may hold this node."""
    key = op_key(node)
    if key in _QUANTIZER:
        return all(op_key(u) == "aten.linear" or supported(u, shapes, constant) for u in node.users)
    if key not in EMITTERS or shapes.get(node, ((), None))[1] is not torch.float32:
        return False
    inputs = [n for n in node.all_input_nodes if n not in constant]
    if any(shapes[n][1] is not torch.float32 or len(shapes[n][0]) > 6 for n in inputs) or not inputs:
        return False
    check = _CONDITIONS.get(key)
    return check is None or check(node, shapes, constant)


def _unary(kind: str) -> Callable[[Emitter, fx.Node], int]:
    return lambda e, n: e.delegate.node(kind, e.shape(n), input_id=e.value(n.args[0]))


def _binary(kind: str) -> Callable[[Emitter, fx.Node], int]:
    def emit(e: Emitter, node: fx.Node) -> int:
        left, right = e.value(node.args[0]), e.value(node.args[1])
        alpha = argument(node, "alpha", 1)
        if alpha != 1:
            right = multiply(e, right, e.value(alpha), e.delegate.shapes[right])
        return e.delegate.node(kind, e.shape(node), input1_id=left, input2_id=right)

    return emit


def multiply(e: Emitter, left: int, right: int, shape: Shape) -> int:
    return e.delegate.node("Multiply", shape, input1_id=left, input2_id=right)


def add(e: Emitter, left: int, right: int, shape: Shape) -> int:
    return e.delegate.node("Add", shape, input1_id=left, input2_id=right)


def _silu(e: Emitter, node: fx.Node) -> int:
    x = e.value(node.args[0])
    gate = e.delegate.node("Sigmoid", e.shape(node), input_id=x)
    return multiply(e, x, gate, e.shape(node))


def _relu(e: Emitter, node: fx.Node) -> int:
    return e.delegate.node("Clamp", e.shape(node), minimum=0.0, input_id=e.value(node.args[0]))


def _gelu(e: Emitter, node: fx.Node) -> int:
    """XNNPACK's gelu is the exact one; tanh's is x / (1 + exp(-2 inner)) = x * sigmoid(2 inner)."""
    x, shape = e.value(node.args[0]), e.shape(node)
    if argument(node, "approximate") == "none":
        return e.delegate.node("Gelu", shape, input_id=x)
    factor = 2 * math.sqrt(2 / math.pi)
    cubic = multiply(e, e.delegate.node("Square", shape, input_id=x), e.value(factor * 0.044715), shape)
    inner = multiply(e, add(e, cubic, e.value(factor), shape), x, shape)
    return multiply(e, x, e.delegate.node("Sigmoid", shape, input_id=inner), shape)


def _mean(e: Emitter, x: int, epsilon: float | None = None) -> int:
    """Mean over the last axis, [.., d] -> [.., 1], as a linear: the delegate has no mean of its own."""
    width = e.delegate.shapes[x][-1]
    assert width is not None
    weight = e.delegate.constant(torch.full((1, width), 1 / width))
    return e.delegate.linear(x, weight, None if epsilon is None else e.value(epsilon))


def _normalize(e: Emitter, x: int, node: fx.Node, epsilon: float) -> int:
    """x / sqrt(mean(x²) + eps), times the weight and plus the bias where the node has them."""
    shape = e.shape(node)
    power = _mean(e, e.delegate.node("Square", shape, input_id=x), epsilon)
    inverse = e.delegate.node("ReciprocalSquareRoot", e.delegate.shapes[power], input_id=power)
    out = multiply(e, x, inverse, shape)
    gain, bias = argument(node, "weight"), argument(node, "bias")
    out = out if gain is None else multiply(e, out, e.value(gain), shape)
    return out if bias is None else add(e, out, e.value(bias), shape)


def _rms_norm(e: Emitter, node: fx.Node) -> int:
    epsilon = argument(node, "eps")
    epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    return _normalize(e, e.value(node.args[0]), node, epsilon)


def _layer_norm(e: Emitter, node: fx.Node) -> int:
    x, shape = e.value(node.args[0]), e.shape(node)
    centred = e.delegate.node("Subtract", shape, input1_id=x, input2_id=_mean(e, x))
    return _normalize(e, centred, node, argument(node, "eps"))


def _reshape(e: Emitter, node: fx.Node) -> int:
    return reshape(e, e.value(node.args[0]), e.shape(node))


def reshape(e: Emitter, x: int, shape: Shape) -> int:
    sizes = [0 if d is None else d for d in shape]  # XNNPACK infers a size given as 0
    return e.delegate.node("StaticReshape", shape, num_dims=len(sizes), new_shape=sizes, input_id=x)


def _permute(e: Emitter, node: fx.Node) -> int:
    rank = len(e.shape(node))
    if is_op(node, "transpose"):
        order = list(range(rank))
        first, second = (argument(node, name) % rank for name in ("dim0", "dim1"))
        order[first], order[second] = second, first
    else:
        order = [d % rank for d in argument(node, "dims")]
    return permute(e, e.value(node.args[0]), order)


def permute(e: Emitter, x: int, order: Sequence[int]) -> int:
    shape = tuple(e.delegate.shapes[x][d] for d in order)
    return e.delegate.node("StaticTranspose", shape, num_dims=len(shape), perm=list(order), input_id=x)


def _matmul(e: Emitter, node: fx.Node) -> int:
    left, right = e.value(node.args[0]), e.value(node.args[1])
    return e.delegate.node("BatchMatrixMultiply", e.shape(node), input1_id=left, input2_id=right)


def _cat(e: Emitter, node: fx.Node) -> int:
    parts = [e.value(p) for p in node.args[0]]  # type: ignore[union-attr]
    axis = int(argument(node, "dim")) % len(e.shape(node))
    return concatenate(e, parts, axis, e.shape(node))


def concatenate(e: Emitter, parts: Sequence[int], axis: int, shape: Shape) -> int:
    fields: dict[str, Any] = {f"input{i}_id": XNN_INVALID_VALUE_ID for i in range(1, 6)}
    fields.update({f"input{i}_id": part for i, part in enumerate(parts, 1)})
    return e.delegate.node(f"Concatenate{len(parts)}", shape, axis=axis, **fields)


def _slice(e: Emitter, node: fx.Node) -> int:
    x, shape = e.value(node.args[0]), e.shape(node)
    dim = int(argument(node, "dim")) % len(shape)
    size = e.delegate.shapes[x][dim]
    assert size is not None
    start = int(argument(node, "start") or 0)
    return narrow(e, x, dim, min(start, size) % max(size, 1) if start < 0 else start, shape)


def narrow(e: Emitter, x: int, dim: int, start: int, shape: Shape) -> int:
    offsets = [start if d == dim else 0 for d in range(len(shape))]
    sizes = [0 if d is None else d for d in shape]
    return e.delegate.node(
        "StaticSlice", shape, num_dims=len(shape), offsets=offsets, sizes=sizes, input_id=x
    )


def _linear(e: Emitter, node: fx.Node) -> int:
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    quantized = op_key(x) in _QUANTIZER
    return e.delegate.linear(
        e.value(x), _weight(e, weight, quantized), None if bias is None else e.value(bias)
    )


def _weight(e: Emitter, node: fx.Node, quantized: bool) -> int:
    """The constant of a linear's weight, in the narrowest form its kernel takes."""
    if is_op(node, "dequantize_per_channel_group", "dequantize_per_channel"):
        stored = e.tensor(node.args[0])  # type: ignore[arg-type]
        scale = e.tensor(node.args[1]).reshape(stored.shape[0], -1)  # type: ignore[arg-type]
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


def _quantize(e: Emitter, node: fx.Node) -> int:
    return e.quantized(e.value(node.args[0]))


def _same(e: Emitter, node: fx.Node) -> int:
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


def _few_parts(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    return 2 <= len(node.args[0]) <= 5  # type: ignore[arg-type]


def _static_slice(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    source = shapes[node.args[0]][0]  # type: ignore[index]
    dim = int(argument(node, "dim")) % len(source)
    return source[dim] is not None and argument(node, "step") == 1


def _float_numbers(node: fx.Node, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> bool:
    return all(isinstance(a, fx.Node | int | float) for a in node.args[:2])


_QUANTIZER = {
    "quantized_decomposed.choose_qparams_per_token_asymmetric",
    "getitem choose_qparams_per_token_asymmetric",
    "quantized_decomposed.quantize_per_token",
    "quantized_decomposed.dequantize_per_token",
}

_CONDITIONS: dict[str, Callable[[fx.Node, dict[fx.Node, Typed], set[fx.Node]], bool]] = {
    "aten.linear": _constant_weight,
    "aten.rms_norm": _last_axis,
    "aten.layer_norm": _last_axis,
    "aten.softmax": _last_axis,
    "aten.cat": _few_parts,
    "aten.slice": _static_slice,
    **{f"aten.{name}": _one_unknown for name in ("view", "reshape", "unflatten", "flatten")},
    **{f"aten.{name}": _float_numbers for name in ("add", "sub", "mul", "div")},
}

EMITTERS: dict[str, Callable[[Emitter, fx.Node], int]] = {
    "aten.linear": _linear,
    "aten.rms_norm": _rms_norm,
    "aten.layer_norm": _layer_norm,
    "aten.silu": _silu,
    "aten.gelu": _gelu,
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
    **{f"aten.{name}": _reshape for name in ("view", "reshape", "unflatten", "flatten", "unsqueeze")},
    "quantized_decomposed.choose_qparams_per_token_asymmetric": _same,
    "quantized_decomposed.quantize_per_token": _quantize,
    "quantized_decomposed.dequantize_per_token": _same,
    "getitem choose_qparams_per_token_asymmetric": _same,
}
