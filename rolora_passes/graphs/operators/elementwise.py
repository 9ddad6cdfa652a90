"""Operators that work element by element: arithmetic, non-linearities, casts and copies."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.bases.variables import Axis, Group, limit, unify
from rolora_passes.graphs.nodes import is_op, op_name
from rolora_passes.graphs.operators.places import pointwise, unmoved
from rolora_passes.graphs.operators.record import (
    Call,
    Operator,
    Scope,
    Spans,
    Trait,
    Words,
    alike,
    every_operand,
)
from rolora_passes.graphs.operators.steps import CHANGED, AxisMap, NoMap, Step, WeightReader, still

# Bases.


def same(s: Scope, node: Call) -> Any:
    """neg, casts, copies: nothing happens to the bases."""
    return list(s.of(node.args[0]))


def nonlinear(s: Scope, node: Call) -> Any:
    """silu, gelu, …: every element for itself."""
    if [a for a in node.args if s.known(a)] != [node.args[0]]:
        return None  # clamp or pow between two tensors
    for axis in s.of(node.args[0]):
        limit(axis, Group.PERMUTATION, node, "acts on every element for itself")
    return list(s.of(node.args[0]))


def _operands(s: Scope, node: Call, values: tuple[object, ...]) -> list[tuple[list[Axis], tuple[int, ...]]]:
    """Axes and sizes of the tensor operands, padded on the left to the result's rank."""
    rank = len(s.shape(node) or ())
    found: list[tuple[list[Axis], tuple[int, ...]]] = []
    for value in values:
        shape = s.shape(value)
        if shape is not None:
            pad = rank - len(shape)
            found.append(([[] for _ in range(pad)] + s.of(value), (1,) * pad + shape))
    return found


def _sum(s: Scope, node: Call) -> Any:
    """add, sub: operands share bases; what is added along a whole axis pins it."""
    return _aligned(s, node, node.args[:2], "adds the same number along the axis")


def _aligned(s: Scope, node: Call, values: tuple[object, ...], why: str) -> list[Axis]:
    operands, scalar = _operands(s, node, values), any(s.shape(v) in (None, ()) for v in values)
    out: list[Axis] = []
    for dim, size in enumerate(s.shape(node) or ()):
        present = [axes[dim] for axes, shape in operands if shape[dim] == size]
        for other in present[1:]:
            unify(present[0], other, node)
        if present and (scalar or len(present) < len(operands)):
            limit(present[0], Group.PERMUTATION, node, why)
        out.append(present[0] if present else [])
    return out


def _product(s: Scope, node: Call) -> Any:
    """mul: an axis on both sides is scaled element by element; an axis on one side only is free."""
    operands = _operands(s, node, node.args[:2])
    out: list[Axis] = []
    for dim, size in enumerate(s.shape(node) or ()):
        present = [axes[dim] for axes, shape in operands if shape[dim] == size]
        for other in present[1:]:
            unify(present[0], other, node)
        if size > 1 and len(present) > 1:
            limit(present[0], Group.PERMUTATION, node, "multiplies the axis element by element")
        out.append(present[0] if present else [])
    return out


def _quotient(s: Scope, node: Call) -> Any:
    """div: as mul, but dividing by an axis is never linear in it."""
    if node.kwargs:
        return None  # rounds
    out = _product(s, node)
    if s.known(node.args[1]):
        for axis in s.of(node.args[1]):
            limit(axis, Group.PERMUTATION, node, "divides by the axis element by element")
    return out


def _where(s: Scope, node: Call) -> Any:
    if len(node.args) != 3:
        return None
    out = _aligned(s, node, node.args[1:], "fills the axis with one number")
    for axes, shape in _operands(s, node, node.args[:1]):
        for dim, size in enumerate(s.shape(node) or ()):
            if shape[dim] == size and size > 1:
                unify(axes[dim], out[dim], node)
                limit(out[dim], Group.PERMUTATION, node, "chooses element by element along the axis")
    return out


# Scalings.


def _homogeneous(node: Call, spans: Spans) -> list[tuple[fx.Node, ...]]:
    """relu(s·x) = s·relu(x) for positive s."""
    return [node.args[:1]] if spans(node.args[0]) else []


def _product_scales(node: Call, spans: Spans) -> list[tuple[fx.Node, ...]]:
    """A product scales by what its operands scale by, multiplied."""
    whole = any(spans(operand, whole=True) for operand in node.all_input_nodes)
    return [node.args[:2]] if whole and not node.kwargs and all(map(spans, node.args)) else []


# What they do to a weight.


def _gain(reader: WeightReader, node: Call) -> list[Step]:
    """A diagonal on one axis of the weight."""
    other = node.args[1]
    if not isinstance(other, fx.Node):
        raise NoMap(f"{node.format_node()} multiplies a weight by a number")
    shape = reader.shape(other)
    shape = [1] * (len(reader.sides) - len(shape)) + shape
    wide = [d for d, size in enumerate(shape) if size > 1] or [len(shape) - 1]
    if len(wide) > 1:
        raise NoMap(f"{node.format_node()} multiplies a weight by a matrix, element by element")
    return [reader.step(wide[0], op_name(node), (), (reader.tensor(other),))]


def _difference(reader: WeightReader, node: Call) -> list[Step]:
    """W - mean(W): centring; anything else is a change of the weight."""
    mean = node.args[1]
    if is_op(mean, "mean") and mean.args[0] is node.args[0]:
        return [reader.step(mean.args[1][0] % len(reader.sides), "centre")]
    return [CHANGED]


def along_axis(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    """A vector shaped to multiply x along an axis."""
    return vector.reshape([-1] + [1] * (x.dim() - dim - 1))


def _divided(x: Tensor, dim: int, vector: Tensor) -> Tensor:
    if not bool((vector != 0).all()):
        raise PassError("an adapter cannot be carried back over a gain of zero, which a pass multiplied in")
    return x / along_axis(vector, x, dim)


def _times(x: Tensor, dim: int, numbers: tuple[int, ...], tensors: list[Tensor]) -> Tensor:
    return x * along_axis(tensors[0], x, dim)


def _over(x: Tensor, dim: int, numbers: tuple[int, ...], tensors: list[Tensor]) -> Tensor:
    return x / along_axis(tensors[0], x, dim)


_MUL = AxisMap(_gain, "mul", forth=_times, back=lambda x, dim, n, t: _divided(x, dim, t[0]), transpose=_times)
_DIV = AxisMap(_gain, "div", forth=_over, back=_times, transpose=_over)
_SUB = AxisMap(
    _difference,
    "centre",
    forth=lambda x, dim, n, t: x - x.mean(dim, keepdim=True),
    back=lambda x, dim, n, t: x,  # what reads it cannot tell
)
_ADD = AxisMap(lambda reader, node: [CHANGED])

# Words.


def _arithmetic(words: Words, node: Call) -> str:
    return words.plain(node, whole_numbers=True)


_LOGITS = Trait.ON_LOGITS
_NONLINEAR: dict[str, Any] = {"basis": nonlinear, "positions": pointwise}

ARITHMETIC = (
    Operator(
        "aten::add",
        basis=_sum,
        axis_map=_ADD,
        positions=pointwise,
        by_row=every_operand,
        words=_arithmetic,
        sign="+",
        traits=Trait.ON_SCORES,
    ),
    Operator(
        "aten::sub",
        basis=_sum,
        axis_map=_SUB,
        positions=pointwise,
        words=_arithmetic,
        sign="-",
        traits=Trait.ON_SCORES,
    ),
    Operator(
        "aten::mul",
        basis=_product,
        scaling=_product_scales,
        axis_map=_MUL,
        positions=pointwise,
        by_row=every_operand,
        words=_arithmetic,
        sign="*",
        traits=_LOGITS,
    ),
    Operator(
        "aten::div",
        basis=_quotient,
        axis_map=_DIV,
        positions=pointwise,
        by_row=every_operand,
        words=_arithmetic,
        sign="/",
        traits=_LOGITS,
    ),
    Operator("aten::pow", **_NONLINEAR, words=_arithmetic, traits=Trait.ACTIVATION),
    Operator("aten::where", basis=_where, positions=pointwise, traits=Trait.ON_SCORES),
)
# Of sizes: Python's own.
SIZES = (
    Operator("operator.add", words=_arithmetic, sign="+"),
    Operator("operator.sub", words=_arithmetic, sign="-"),
    Operator("operator.mul", words=_arithmetic, sign="*"),
    Operator("operator.floordiv"),
    Operator("operator.neg"),
)
NON_LINEARITIES = (
    *alike("sigmoid tanh", **_NONLINEAR, traits=Trait.ACTIVATION | _LOGITS),
    *alike("silu gelu elu square hardswish", **_NONLINEAR, traits=Trait.ACTIVATION),
    Operator("aten::relu", **_NONLINEAR, scaling=_homogeneous, traits=Trait.ACTIVATION | Trait.ON_SCORES),
    Operator("aten::leaky_relu", **_NONLINEAR, scaling=_homogeneous, traits=Trait.ACTIVATION),
    Operator("aten::abs", **_NONLINEAR, scaling=_homogeneous),
    Operator("aten::clamp", **_NONLINEAR, traits=_LOGITS),
    *alike(
        "exp log rsqrt sqrt reciprocal cos sin erf softplus clamp_min hardtanh mish relu6 hardsigmoid"
        " log_sigmoid",
        **_NONLINEAR,
    ),
)
# Of these nothing is known but that they work position by position.
POINTWISE = (
    Operator("aten::masked_fill", positions=pointwise, traits=Trait.ON_SCORES),
    *alike(
        "rsub exp2 log2 log1p sign celu selu prelu clamp_max clip minimum maximum eq ne lt gt le ge __and__"
        " __or__ bitwise_and bitwise_or bitwise_not logical_and logical_or logical_not floor ceil round trunc"
        " remainder fmod floor_divide expm1 lerp addcmul addcdiv threshold isnan isinf nan_to_num true_divide"
        " xlogy logical_xor bitwise_xor atan sinh cosh tan",
        positions=pointwise,
    ),
)
_STILL: dict[str, Any] = {"basis": same, "positions": unmoved}
CASTS = (
    Operator(
        "aten::to", **_STILL, axis_map=AxisMap(still), by_row=every_operand, traits=Trait.CAST | _LOGITS
    ),
    Operator("aten::_to_copy", **_STILL, traits=Trait.CAST),
    Operator("aten::type_as", **_STILL, traits=Trait.CAST | _LOGITS),
    Operator("aten::float", positions=unmoved),
)
COPIES = (
    Operator("aten::neg", basis=same, positions=pointwise, traits=_LOGITS),
    *alike("clone contiguous", **_STILL, traits=Trait.COPY | _LOGITS),
    *alike("alias detach positive", **_STILL, traits=Trait.COPY),
    Operator("aten::lift_fresh_copy", positions=unmoved, traits=Trait.COPY),
    *alike("detach_ lift_fresh view_as", traits=Trait.COPY),
)
OPERATORS = (*ARITHMETIC, *SIZES, *NON_LINEARITIES, *POINTWISE, *CASTS, *COPIES)
