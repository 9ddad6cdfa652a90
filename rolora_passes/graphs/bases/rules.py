"""What each operator does to bases. A rule returns the axes of its result; None: no rule after all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rolora_passes.graphs.bases.variables import Axis, Group, limit, resolve, tag, take, unify
from rolora_passes.graphs.graph import argument, op_name

if TYPE_CHECKING:
    from rolora_passes.graphs.bases.inference import _Inference

Call = Any  # an fx.Node of the operator a rule is for, whose arguments that operator types
Rule = Callable[["_Inference", Call], Any]


def _same(s: _Inference, node: Call) -> Any:
    """neg, casts, copies: nothing happens to the bases."""
    return list(s.of(node.args[0]))


def _nonlinear(s: _Inference, node: Call) -> Any:
    """silu, gelu, …: every element for itself."""
    if [a for a in node.args if s.known(a)] != [node.args[0]]:
        return None  # clamp or pow between two tensors
    for axis in s.of(node.args[0]):
        limit(axis, Group.PERMUTATION, node, "acts on every element for itself")
    return list(s.of(node.args[0]))


def _operands(
    s: _Inference, node: Call, values: tuple[object, ...]
) -> list[tuple[list[Axis], tuple[int, ...]]]:
    """Axes and sizes of the tensor operands, padded on the left to the result's rank."""
    rank = len(s.shape(node) or ())
    found: list[tuple[list[Axis], tuple[int, ...]]] = []
    for value in values:
        shape = s.shape(value)
        if shape is not None:
            pad = rank - len(shape)
            found.append(([[] for _ in range(pad)] + s.of(value), (1,) * pad + shape))
    return found


def _sum(s: _Inference, node: Call) -> Any:
    """add, sub: operands share bases; what is added along a whole axis pins it."""
    return _aligned(s, node, node.args[:2], "adds the same number along the axis", pinned=True)


def _aligned(s: _Inference, node: Call, values: tuple[object, ...], why: str, pinned: bool) -> Any:
    operands, scalar = _operands(s, node, values), any(s.shape(v) in (None, ()) for v in values)
    out: list[Axis] = []
    for dim, size in enumerate(s.shape(node) or ()):
        present = [axes[dim] for axes, shape in operands if shape[dim] == size]
        for other in present[1:]:
            unify(present[0], other, node)
        if present and pinned and (scalar or len(present) < len(operands)):
            limit(present[0], Group.PERMUTATION, node, why)
        out.append(present[0] if present else [])
    return out


def _product(s: _Inference, node: Call) -> Any:
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


def _quotient(s: _Inference, node: Call) -> Any:
    """div: as mul, but dividing by an axis is never linear in it."""
    if node.kwargs:
        return None  # rounds
    out = _product(s, node)
    if s.known(node.args[1]):
        for axis in s.of(node.args[1]):
            limit(axis, Group.PERMUTATION, node, "divides by the axis element by element")
    return out


def _where(s: _Inference, node: Call) -> Any:
    if len(node.args) != 3:
        return None
    out = _aligned(s, node, node.args[1:], "fills the axis with one number", pinned=True)
    for axes, shape in _operands(s, node, node.args[:1]):
        for dim, size in enumerate(s.shape(node) or ()):
            if shape[dim] == size and size > 1:
                unify(axes[dim], out[dim], node)
                limit(out[dim], Group.PERMUTATION, node, "chooses element by element along the axis")
    return out


def _linear(s: _Inference, node: Call) -> Any:
    x, weight = s.of(node.args[0]), s.of(node.args[1])
    if len(weight) != 2:
        return None
    unify(x[-1], weight[1], node, flip=True)
    bias = argument(node, "bias")
    if bias is not None:
        if s.shape(bias) != s.shape(node.args[1])[:1]:
            return None  # one number for all
        unify(weight[0], s.of(bias)[0], node)
    return [*x[:-1], weight[0]]


def _matmul(s: _Inference, node: Call) -> Any:
    a, b = s.of(node.args[0]), s.of(node.args[1])
    if len(a) < 2 or len(b) < 2:
        return None
    unify(a[-1], b[-2], node, flip=True)
    batch = s.shape(node)[:-2]
    out: list[Axis] = []
    for place, size in enumerate(batch, start=-len(batch)):
        present = [
            axes[place - 2]
            for axes, value in ((a, node.args[0]), (b, node.args[1]))
            if len(axes) >= 2 - place and s.shape(value)[place - 2] == size
        ]
        for other in present[1:]:
            unify(present[0], other, node)
        if len(present) > 1:
            limit(present[0], Group.PERMUTATION, node, "multiplies matrix by matrix along the axis")
        out.append(present[0])
    return [*out, a[-2], b[-1]]


def _embedding(s: _Inference, node: Call) -> Any:
    rows, columns = s.of(node.args[0])
    limit(rows, Group.NONE, node, "looks rows up by number")
    tag(columns, "embedding")
    return [*s.of(node.args[1]), columns]


def _rms_norm(s: _Inference, node: Call) -> Any:
    return _norm(s, node, Group.ORTHOGONAL, "keeps lengths only", argument(node, "weight"))


def _layer_norm(s: _Inference, node: Call) -> Any:
    why = "subtracts the mean along the axis (fuse-norm folds that into what writes it, where it can)"
    return _norm(s, node, Group.PERMUTATION, why, argument(node, "weight"), argument(node, "bias"))


def _norm(s: _Inference, node: Call, group: Group, why: str, *affine: object) -> Any:
    x = s.of(node.args[0])
    if len(node.args[1]) != 1:
        return None
    tag(x[-1], "norm")
    limit(x[-1], group, node, why)
    for value in affine:
        if value is not None:
            unify(x[-1], s.of(value)[0], node)
            limit(x[-1], Group.PERMUTATION, node, "scales the axis element by element")
    for axis in x[:-1]:
        limit(axis, Group.PERMUTATION, node, "normalises every row for itself")
    return list(x)


def _attention(s: _Inference, node: Call) -> Any:
    q, k, v = (s.of(a) for a in node.args[:3])
    for axes in (q, k, v):
        for axis in axes[:3]:
            limit(axis, Group.NONE, node, "gives every head and position its own softmax")
    unify(q[3], k[3], node, flip=True)
    tag(q[3], "query")
    tag(v[3], "value")
    return [*q[:3], v[3]]


def _rotary(s: _Inference, node: Call) -> Any:
    x = s.of(node.args[0])
    limit(x[3], Group.NONE, node, "turns pairs of channels by the position")
    for axis in (*x[:2], *(a for t in node.args[1:3] for a in s.of(t))):
        limit(axis, Group.NONE, node, "turns pairs of channels by the position")
    return list(x)


def _reshape(s: _Inference, node: Call) -> Any:
    """view, flatten, unflatten: deal the factors out again, splitting where an axis ends inside one."""
    if any(isinstance(a, torch.dtype) for a in node.args):
        return None  # reinterprets bits
    rest = [factor for axis in s.of(node.args[0]) for factor in axis]
    out: list[Axis] = []
    for size in s.shape(node) or ():
        cut = take(rest, size)
        if cut is None:
            return None
        out.append(cut[0])
        rest = cut[1]
    return out


def _expand(s: _Inference, node: Call) -> Any:
    x, before, after = s.of(node.args[0]), s.shape(node.args[0]), s.shape(node)
    assert before is not None and after is not None
    pad = len(after) - len(before)
    return [
        x[dim - pad]
        if dim >= pad and before[dim - pad] == size
        else s.fresh(size, node, "repeats one value along the axis")
        for dim, size in enumerate(after)
    ]


def _unsqueeze(s: _Inference, node: Call) -> Any:
    x = list(s.of(node.args[0]))
    dim = int(node.args[1])
    x.insert(dim % (len(x) + 1), [])
    return x


def _squeeze(s: _Inference, node: Call) -> Any:
    dims = node.args[1] if len(node.args) > 1 else None
    x = s.of(node.args[0])
    if dims is None:
        return None
    chosen = {d % len(x) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return [axis for dim, axis in enumerate(x) if dim not in chosen or resolve(axis)]


def _transpose(s: _Inference, node: Call) -> Any:
    x = list(s.of(node.args[0]))
    first, second = (node.args[1:3]) if len(node.args) > 1 else (0, 1)
    if len(x) > 1:
        x[first], x[second] = x[second], x[first]
    return x


def _permute(s: _Inference, node: Call) -> Any:
    x = s.of(node.args[0])
    return [x[d] for d in node.args[1]]


def _slice(s: _Inference, node: Call) -> Any:
    dim = int(node.args[1]) if len(node.args) > 1 else 0
    return _part(s, node, dim, s.shape(node))


def _part(s: _Inference, node: Call, dim: int, shape: tuple[int, ...] | None) -> list[Axis]:
    """A range of one axis: that axis is pinned, unless the range is all of it."""
    x = list(s.of(node.args[0]))
    assert shape is not None
    before = s.shape(node.args[0])
    if before is not None and before[dim] != shape[dim]:
        limit(x[dim], Group.NONE, node, "takes the axis apart")
        x[dim] = s.fresh(shape[dim], node, "is a part of an axis")
    return x


def _split(s: _Inference, node: Call) -> Any:
    dim = argument(node, "dim")
    return tuple(_part(s, node, dim, tuple(part.shape)) for part in s.shapes[node])


def _getitem(s: _Inference, node: Call) -> Any:
    parts = s.axes.get(node.args[0])
    return parts[node.args[1]] if isinstance(parts, tuple) else None


def _select(s: _Inference, node: Call) -> Any:
    x = list(s.of(node.args[0]))
    limit(x.pop(int(node.args[1])), Group.NONE, node, "takes one element of the axis")
    return x


def _index(s: _Inference, node: Call) -> Any:
    """Rows by number: x[:, idx]; the other axes pass."""
    x, positions = list(s.of(node.args[0])), node.args[1]
    chosen = [(i, n) for i, n in enumerate(positions) if n is not None]
    if len(chosen) != 1:
        return None
    dim, index = chosen[0]
    limit(x[dim], Group.NONE, node, "looks rows up by number")
    return [*x[:dim], *s.of(index), *x[dim + 1 :]]


def _index_select(s: _Inference, node: Call) -> Any:
    x, dim = list(s.of(node.args[0])), int(node.args[1])
    limit(x[dim], Group.NONE, node, "looks rows up by number")
    x[dim] = s.of(node.args[2])[0]
    return x


def _index_put(s: _Inference, node: Call) -> Any:
    """Rows replaced by number (a merge of modalities): what is left of both must share bases."""
    x, positions, values = s.of(node.args[0]), node.args[1], s.of(node.args[2])
    if any(p is None for p in positions) or len(node.args) > 3:
        return None
    count = sum(len(s.of(p)) if s.masks(p) else 1 for p in positions)
    rows, rest = x[:count], x[count:]
    for axis in (*rows, *values[: len(values) - len(rest)]):
        limit(axis, Group.NONE, node, "replaces rows by number")
    if s.shape(node.args[2])[len(values) - len(rest) :] != s.shape(node)[len(rows) :]:
        return None
    for axis, other in zip(rest, values[len(values) - len(rest) :], strict=True):
        unify(axis, other, node)
    return list(x)


def _concatenate(s: _Inference, node: Call) -> Any:
    parts = [s.of(part) for part in node.args[0]]
    dim = int(node.args[1]) if len(node.args) > 1 else 0
    stacked = op_name(node) == "stack"
    out = []
    for place in range(len(parts[0])):
        for other in parts[1:]:
            if stacked or place != dim % len(parts[0]):
                unify(parts[0][place], other[place], node)
        out.append(parts[0][place])
    shape = s.shape(node) or ()
    joined = s.fresh(shape[dim], node, "joins parts along the axis")
    if stacked:
        return [*out[: dim % len(shape)], joined, *out[dim % len(shape) :]]
    for part in parts:
        limit(part[dim], Group.NONE, node, "joins parts along the axis")
    out[dim] = joined
    return out


def _reduce(s: _Inference, node: Call) -> Any:
    """sum, mean: linear, but not invariant along what they reduce."""
    x, dims = s.of(node.args[0]), argument(node, "dim")
    if dims is None or dims == []:
        dims = range(len(x))
    chosen = {d % len(x) for d in (dims if hasattr(dims, "__iter__") else [dims])}
    for dim in chosen:
        limit(x[dim], Group.PERMUTATION, node, "adds up along the axis")
    if argument(node, "keepdim"):
        return [[] if dim in chosen else axis for dim, axis in enumerate(x)]
    return [axis for dim, axis in enumerate(x) if dim not in chosen]


def _repeat_interleave(s: _Inference, node: Call) -> Any:
    count, dim = node.args[1], argument(node, "dim")
    if not isinstance(count, int) or dim is None:
        return None
    x = list(s.of(node.args[0]))
    x[dim] = [*x[dim], *s.fresh(count, node, "repeats one value along the axis")]
    return x


def _hadamard(s: _Inference, node: Call) -> Any:
    """hadamard, kronecker: the basis ends here, and that of the matrices is their own."""
    x, dim = list(s.of(node.args[0])), argument(node, "dim")
    for axis in [x[dim], *(axis for matrix in argument(node, "factors", ()) for axis in s.of(matrix))]:
        limit(axis, Group.NONE, node, "is a fixed transform of the axis at run time")
    x[dim] = s.fresh(s.shape(node)[dim], node, "comes out of a fixed transform")
    return x


def _table(*entries: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in entries for name in names.split()}


RULES: dict[str, Rule] = _table(
    (_same, "neg to _to_copy type_as clone contiguous alias detach positive"),
    (
        _nonlinear,
        "silu gelu relu sigmoid tanh exp log pow rsqrt sqrt square abs reciprocal cos sin erf softplus clamp"
        " clamp_min leaky_relu elu hardtanh hardswish mish relu6 hardsigmoid log_sigmoid"
        " softmax _softmax log_softmax",
    ),
    (_sum, "add sub"),
    (_product, "mul"),
    (_quotient, "div"),
    (_where, "where"),
    (_linear, "linear"),
    (_matmul, "matmul mm bmm"),
    (_embedding, "embedding"),
    (_rms_norm, "rms_norm"),
    (_layer_norm, "layer_norm"),
    (_attention, "attention"),
    (_rotary, "rotary_embedding"),
    (_reshape, "view reshape _unsafe_view flatten unflatten"),
    (_expand, "expand"),
    (_unsqueeze, "unsqueeze"),
    (_squeeze, "squeeze"),
    (_transpose, "transpose t swapaxes"),
    (_permute, "permute"),
    (_slice, "slice"),
    (_split, "chunk split split_with_sizes"),
    (_getitem, "getitem"),
    (_select, "select"),
    (_index, "index"),
    (_index_select, "index_select"),
    (_index_put, "index_put"),
    (_concatenate, "cat stack"),
    (_reduce, "sum mean"),
    (_repeat_interleave, "repeat_interleave"),
    (_hadamard, "hadamard kronecker"),
)
