"""Lowerings to standard ONNX operators, which both flavours share."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.emitter import Emitter, Heads, Lowering, Node, Result
from rolora_passes.export.onnx.fake_quantize import fake_quantize, fake_quantize_static
from rolora_passes.export.onnx.norms import folded_norm, norm_affine, norm_form
from rolora_passes.graphs.graph import argument, get_tensor, is_op
from rolora_passes.numerics.hadamard import few_factors

_CASTS = {
    torch.float32: ir.DataType.FLOAT,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.bool: ir.DataType.BOOL,
}


def _same(kind: str, count: int = 2) -> Lowering:
    """An operator of the same operands in the same order."""
    return lambda e, node: e.op(kind, *(e.value(a) for a in node.args[:count]))


def _first(kind: str, **attributes: Any) -> Lowering:
    """An operator of one operand."""
    return lambda e, node: e.op(kind, e.value(node.args[0]), **attributes)


def _operands(e: Emitter, node: Node) -> list[ir.Value]:
    """Two operands in the result's type, to which torch promotes them unasked."""
    return [
        e.op("Cast", e.value(a), to=_CASTS[e.shapes[node][1]])
        if a in e.shapes and node in e.shapes and e.shapes[a][1] != e.shapes[node][1]
        else e.value(a)
        for a in node.args[:2]
    ]


def _arithmetic(kind: str) -> Lowering:
    return lambda e, node: e.op(kind, *_operands(e, node))


def _mul(e: Emitter, node: Node) -> Result:
    norm = folded_norm(e, node)
    return e.result(norm) if norm else e.op("Mul", *_operands(e, node))


def _scaled(kind: str) -> Lowering:
    """add and sub: x ± alpha·y"""

    def lower(e: Emitter, node: Node) -> Result:
        norm = folded_norm(e, node)
        if norm:
            return e.result(norm)
        x, y = _operands(e, node)
        alpha = argument(node, "alpha", 1) if isinstance(node.target, torch._ops.OpOverload) else 1
        return e.op(kind, x, y if alpha == 1 else e.op("Mul", y, e.value(alpha)))

    return lower


def _silu(e: Emitter, node: Node) -> Result:
    x = e.value(node.args[0])
    return e.op("Mul", x, e.op("Sigmoid", x))


def _gelu(e: Emitter, node: Node) -> Result:
    return e.op("Gelu", e.value(node.args[0]), approximate=argument(node, "approximate", "none"))


def _layer_norm(e: Emitter, node: Node) -> Result:
    inputs = (e.value(node.args[0]), *norm_affine(e, node))
    return e.op("LayerNormalization", *inputs, **norm_form(node))


def float_linear(e: Emitter, node: Node) -> ir.Value:
    """x·Wᵀ + b, the weight stored transposed."""
    x, weight, bias = e.value(node.args[0]), node.args[1], argument(node, "bias")
    if weight.op == "get_attr":
        transposed = e.store.add(f"{weight.target}.T", get_tensor(e.graph, str(weight.target)).T)
    else:
        transposed = e.op("Transpose", e.value(weight), perm=[1, 0])
    product = e.op("MatMul", x, transposed)
    return product if bias is None else e.op("Add", product, e.value(bias))


def _softmax(e: Emitter, node: Node) -> Result:
    return e.op("Softmax", e.value(node.args[0]), axis=argument(node, "dim"))


def _reduce(kind: str) -> Lowering:
    def lower(e: Emitter, node: Node) -> Result:
        dims = argument(node, "dim")
        axes = e.integers(*(dims if isinstance(dims, (list, tuple)) else [dims]))
        return e.op(kind, e.value(node.args[0]), axes, keepdims=int(argument(node, "keepdim", False)))

    return lower


def _topk(e: Emitter, node: Node) -> Result:
    count, dim = argument(node, "k"), argument(node, "dim", -1)
    return tuple(e.ops("TopK", e.value(node.args[0]), e.integers(count), axis=dim, outputs=2))


def _getitem(e: Emitter, node: Node) -> Result:
    found = e.result(node.args[0])
    assert isinstance(found, tuple)
    picked: ir.Value = found[node.args[1]]
    return picked


def _index(e: Emitter, node: Node) -> Result:
    x, indices = node.args[0], node.args[1]
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or not isinstance(indices[0], fx.Node):
        raise LoweringError("only x[i] with one index tensor is lowered")
    return e.op("Gather", e.value(x), e.value(indices[0]), axis=0)


def _embedding(e: Emitter, node: Node) -> Result:
    return e.op("Gather", e.value(node.args[0]), e.value(node.args[1]), axis=0)


def _gather(e: Emitter, node: Node) -> Result:
    x, dim, index = (argument(node, n) for n in ("self", "dim", "index"))
    return e.op("GatherElements", e.value(x), e.value(index), axis=dim)


def _select(e: Emitter, node: Node) -> Result:
    x, dim, index = (argument(node, n) for n in ("self", "dim", "index"))
    return e.op("Gather", e.value(x), e.value_of(index, torch.int64), axis=dim)


def _compare(kind: str, negated: bool = False) -> Lowering:
    """A comparison with a value or a number of the operand's type."""

    def lower(e: Emitter, node: Node) -> Result:
        x, y = node.args[:2]
        result = e.op(kind, e.value(x), e.value_of(y, e.shapes[x][1]))
        return e.op("Not", result) if negated else result

    return lower


def _conv1d(e: Emitter, node: Node) -> Result:
    bias = argument(node, "bias")
    inputs = [e.value(a) for a in (*node.args[:2], bias) if a is not None]
    stride, padding, dilation = (list(argument(node, n)) for n in ("stride", "padding", "dilation"))
    options = {
        "strides": stride,
        "pads": padding * 2,
        "dilations": dilation,
        "group": argument(node, "groups"),
    }
    return e.op("Conv", *inputs, **options)


def _cumsum(e: Emitter, node: Node) -> Result:
    return e.op("CumSum", e.value(node.args[0]), e.numbers(argument(node, "dim"), torch.int64))


def _clamp_to(e: Emitter, node: Node) -> Result:
    bounds = [argument(node, name) for name in ("min", "max")]
    values = [None if bound is None else e.value(bound) for bound in bounds]
    return e.op("Clip", e.value(node.args[0]), *values)


# Shapes


def _unflatten(e: Emitter, node: Node) -> Result:
    x, dim, sizes = node.args
    rank = e.rank(x)
    axis = dim % rank
    if rank == 3 and axis == 2 and len(sizes) == 2:
        count, width = (int(n) for n in e.shape(node)[2:])
        return Heads(e.value(x), count, width)
    after = [int(n) for n in sizes]
    return e.reshape(e.value(x), *[0] * axis, *after, *_tail(e, x, axis + 1))


def _flatten(e: Emitter, node: Node) -> Result:
    x = node.args[0]
    rank = e.rank(x)
    first, last = (argument(node, name) % rank for name in ("start_dim", "end_dim"))
    if (rank, first, last) == (4, 2, 3):
        return e.flat(x)
    if all(isinstance(size, int) for size in e.shape(x)[last + 1 :]):
        return e.reshape(e.value(x), *[0] * first, -1, *_tail(e, x, last + 1))
    value = e.value(x)
    rest = e.op("Shape", value, start=last + 1)
    return e.op("Reshape", value, e.op("Concat", e.integers(*[0] * first, -1), rest, axis=0))


def _tail(e: Emitter, node: Node, start: int) -> list[int]:
    """The sizes from an axis on."""
    sizes = e.shape(node)[start:]
    if not all(isinstance(size, int) for size in sizes):
        raise LoweringError(f"expected constant sizes behind axis {start}, found {sizes}")
    return [int(size) for size in sizes]


def _view(e: Emitter, node: Node) -> Result:
    return e.op("Reshape", e.value(node.args[0]), _sizes(e, node.args[1]))


def _expand(e: Emitter, node: Node) -> Result:
    kept = [1 if size == -1 else size for size in node.args[1]]  # what has that size already keeps it
    return e.op("Expand", e.value(node.args[0]), _sizes(e, kept))


def _sizes(e: Emitter, sizes: list[Any]) -> ir.Value:
    """A shape of numbers and of values that are known at run time: int64 [n]."""
    if all(isinstance(size, int) for size in sizes):
        return e.integers(*sizes)
    one = e.integers(1)
    parts = [e.integers(n) if isinstance(n, int) else e.op("Reshape", e.value(n), one) for n in sizes]
    return e.op("Concat", *parts, axis=0)


def _transpose(e: Emitter, node: Node) -> Result:
    rank = e.rank(node)
    order = list(range(rank))
    i, j = (node.args[1] % rank, node.args[2] % rank) if len(node.args) > 1 else (0, 1)
    order[i], order[j] = order[j], order[i]
    return e.op("Transpose", e.value(node.args[0]), perm=order)


def _permute(e: Emitter, node: Node) -> Result:
    return e.op("Transpose", e.value(node.args[0]), perm=[d % e.rank(node) for d in node.args[1]])


def _axes(kind: str) -> Lowering:
    """unsqueeze and squeeze of one axis"""
    return lambda e, node: e.op(kind, e.value(node.args[0]), e.integers(node.args[1]))


def _slice(e: Emitter, node: Node) -> Result:
    x, dim, start, end, step = (argument(node, n) for n in ("self", "dim", "start", "end", "step"))
    axis, start, end = dim % e.rank(node), start or 0, 2**62 if end is None else end
    if step != 1 or not isinstance(start, int) or not isinstance(end, int):
        raise LoweringError("only slices with constant bounds and step 1 are lowered")
    found = e.result(x)
    if isinstance(found, Heads) and axis == 2:
        count, width = int(e.shape(node)[2]), found.width
        return Heads(e.slice(e.flat(x), 2, start * width, (start + count) * width), count, width)
    return e.slice(e.value(x), axis, start, end)


def _cat(e: Emitter, node: Node) -> Result:
    parts = [e.value(part) for part in node.args[0]]
    return e.op("Concat", *parts, axis=argument(node, "dim", 0))


def _repeat_interleave(e: Emitter, node: Node) -> Result:
    x, count, dim = node.args[0], argument(node, "repeats"), argument(node, "dim")
    axis, rank = dim % e.rank(x), e.rank(x)
    times = [1] * (rank + 1)
    times[axis + 1] = count
    tiled = e.op("Tile", e.op("Unsqueeze", e.value(x), e.integers(axis + 1)), e.integers(*times))
    return e.reshape(tiled, *[0] * axis, -1, *_tail(e, x, axis + 1))


def _repeat(e: Emitter, node: Node) -> Result:
    return e.op("Tile", e.value(node.args[0]), _sizes(e, node.args[1]))


def _size(e: Emitter, node: Node) -> Result:
    dim = argument(node, "dim")
    return e.op("Squeeze", e.op("Shape", e.value(node.args[0]), start=dim, end=dim + 1))


def _arange(e: Emitter, node: Node) -> Result:
    bounds = [e.value(a) for a in node.args]
    zero, one = (e.numbers(n, torch.int64) for n in (0, 1))
    return e.op("Range", *{1: [zero, *bounds, one], 2: [*bounds, one]}.get(len(bounds), bounds))


def _cast(e: Emitter, node: Node) -> Result:
    dtype = e.shapes[node][1]
    if dtype not in _CASTS:
        raise LoweringError(f"no cast to {dtype} is lowered")
    return e.op("Cast", e.value(node.args[0]), to=_CASTS[dtype])


# Rotations at run time


def _hadamard(e: Emitter, node: Node) -> Result:
    return _transform(e, node, few_factors(argument(node, "order")), argument(node, "inner"))


def _kronecker(e: Emitter, node: Node) -> Result:
    return _transform(e, node, [e.parameter(factor) for factor in node.args[1]], 1)


def _transform(e: Emitter, node: Node, factors: list[torch.Tensor], inner: int) -> Result:
    """One product for every Kronecker factor; an axis is read as (outer, order, inner)."""
    x = node.args[0]
    dim, rank = argument(node, "dim") % e.rank(x), e.rank(x)
    rest = _tail(e, x, dim)
    value, sizes, right = e.value(x), rest, inner * math.prod(rest[1:])
    for factor in reversed(factors):
        k = len(factor)
        left = math.prod(rest) // (k * right)
        needed = [n for n in (left, k, right) if n != 1 or n == k] if k > 1 else sizes
        if needed != sizes:
            value, sizes = e.reshape(value, *[0] * dim, *needed), needed
        operands = (value, _matrix(e, factor)) if right == 1 else (_matrix(e, factor.T), value)
        value, right = e.op("MatMul", *operands), right * k
    if rank == 4 and dim == 3:
        return Heads(e.reshape(value, 0, 0, -1), e.shape(node)[2], rest[0])
    return value if sizes == rest else e.reshape(value, *[0] * dim, *rest)


def _matrix(e: Emitter, factor: torch.Tensor) -> ir.Value:
    key = ("hadamard", tuple(map(tuple, factor.tolist())))
    if key not in e.shared:
        e.shared[key] = e.store.add(f"hadamard_{len(factor)}", factor.float().contiguous())
    return e.shared[key]


STANDARD: dict[str, Lowering] = {
    "add": _scaled("Add"), "sub": _scaled("Sub"), "mul": _mul, "div": _arithmetic("Div"),
    "pow": _arithmetic("Pow"), "matmul": _same("MatMul"), "bmm": _same("MatMul"),
    "neg": _first("Neg"), "exp": _first("Exp"), "log": _first("Log"), "sqrt": _first("Sqrt"),
    "abs": _first("Abs"),
    "cos": _first("Cos"), "sin": _first("Sin"), "tanh": _first("Tanh"), "sigmoid": _first("Sigmoid"),
    "relu": _first("Relu"), "silu": _silu, "gelu": _gelu, "softmax": _softmax,
    "sum": _reduce("ReduceSum"), "mean": _reduce("ReduceMean"), "topk": _topk, "getitem": _getitem,
    "where": _same("Where", 3), "eq": _compare("Equal"), "ne": _compare("Equal", negated=True),
    "lt": _compare("Less"), "gt": _compare("Greater"), "le": _compare("LessOrEqual"),
    "ge": _compare("GreaterOrEqual"), "__and__": _same("And"), "bitwise_and": _same("And"),
    "bitwise_not": _first("Not"), "logical_not": _first("Not"), "sign": _first("Sign"),
    "ceil": _first("Ceil"),
    "conv1d": _conv1d, "clamp": _clamp_to, "cumsum": _cumsum, "gather": _gather, "select": _select,
    "layer_norm": _layer_norm, "index": _index, "embedding": _embedding,
    "unflatten": _unflatten, "flatten": _flatten, "view": _view, "reshape": _view, "expand": _expand,
    "transpose": _transpose, "t": _transpose, "permute": _permute,
    "unsqueeze": _axes("Unsqueeze"), "squeeze": _axes("Squeeze"),
    "slice": _slice, "cat": _cat, "repeat_interleave": _repeat_interleave,
    "sym_size": _size, "arange": _arange, "to": _cast, "type_as": _cast, "repeat": _repeat,
    "hadamard": _hadamard, "kronecker": _kronecker,
    "fake_quantize": fake_quantize, "fake_quantize_static": fake_quantize_static,
}  # fmt: skip

# Whose row s of a result [B, S, ..] depends on row s of its operands [B, S, ..] alone.
ROWWISE = {
    "add", "sub", "mul", "div", "pow", "neg", "exp", "tanh", "sigmoid", "relu", "silu", "gelu",
    "linear", "rms_norm", "layer_norm", "hadamard", "kronecker", "fake_quantize", "fake_quantize_static",
    "unflatten", "flatten",
}  # fmt: skip


def is_rowwise(e: Emitter, node: Node) -> bool:
    """Whether a node may be computed for one token alone."""
    if not is_op(node, *ROWWISE) or not all(a in e.shapes for a in [node, *node.all_input_nodes]):
        return False
    values = [node, *(a for a in node.all_input_nodes if a not in e.constants)]
    return all(e.shape(v)[:2] == ("batch", "length") and e.rank(v) > 2 for v in values)
