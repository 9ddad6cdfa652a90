"""Lowerings to standard ONNX operators, which both flavours share."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.emitter import Lowering, OnnxEmitter, Result
from rolora_passes.export.onnx.fake_quantize import fake_quantize, fake_quantize_static
from rolora_passes.export.onnx.norms import norm_affine, norm_form
from rolora_passes.export.onnx.prepared import Node
from rolora_passes.export.onnx.reshaping import RESHAPING
from rolora_passes.export.onnx.transforms import hadamard, kronecker
from rolora_passes.graphs.graph import argument

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


def _operands(e: OnnxEmitter, node: Node) -> list[ir.Value]:
    """Two operands in the result's type, to which torch promotes them unasked."""
    return [
        e.op("Cast", e.value(a), to=_CASTS[e.graph.dtype(node)])
        if a in e.graph.shapes and node in e.graph.shapes and e.graph.dtype(a) != e.graph.dtype(node)
        else e.value(a)
        for a in node.args[:2]
    ]


def _arithmetic(kind: str) -> Lowering:
    return lambda e, node: e.op(kind, *_operands(e, node))


def _scaled(kind: str) -> Lowering:
    """add and sub: x ± alpha·y"""

    def lower(e: OnnxEmitter, node: Node) -> Result:
        x, y = _operands(e, node)
        alpha = argument(node, "alpha", 1) if isinstance(node.target, torch._ops.OpOverload) else 1
        return e.op(kind, x, y if alpha == 1 else e.op("Mul", y, e.value(alpha)))

    return lower


def _silu(e: OnnxEmitter, node: Node) -> Result:
    x = e.value(node.args[0])
    return e.op("Mul", x, e.op("Sigmoid", x))


def _gelu(e: OnnxEmitter, node: Node) -> Result:
    return e.op("Gelu", e.value(node.args[0]), approximate=argument(node, "approximate", "none"))


def _layer_norm(e: OnnxEmitter, node: Node) -> Result:
    inputs = (e.value(node.args[0]), *norm_affine(e, node))
    return e.op("LayerNormalization", *inputs, **norm_form(node))


def float_linear(e: OnnxEmitter, node: Node) -> ir.Value:
    """x·Wᵀ + b, the weight stored transposed."""
    x, weight, bias = e.value(node.args[0]), node.args[1], argument(node, "bias")
    if weight.op == "get_attr":
        transposed = e.store.add(f"{weight.target}.T", e.graph.parameter(weight).T)
    else:
        transposed = e.op("Transpose", e.value(weight), perm=[1, 0])
    product = e.op("MatMul", x, transposed)
    return product if bias is None else e.op("Add", product, e.value(bias))


def _softmax(e: OnnxEmitter, node: Node) -> Result:
    return e.op("Softmax", e.value(node.args[0]), axis=argument(node, "dim"))


def _reduce(kind: str) -> Lowering:
    def lower(e: OnnxEmitter, node: Node) -> Result:
        dims = argument(node, "dim")
        axes = e.integers(*(dims if isinstance(dims, (list, tuple)) else [dims]))
        return e.op(kind, e.value(node.args[0]), axes, keepdims=int(argument(node, "keepdim", False)))

    return lower


def _topk(e: OnnxEmitter, node: Node) -> Result:
    count, dim = argument(node, "k"), argument(node, "dim", -1)
    return tuple(e.ops("TopK", e.value(node.args[0]), e.integers(count), axis=dim, outputs=2))


def _getitem(e: OnnxEmitter, node: Node) -> Result:
    found = e.result(node.args[0])
    assert isinstance(found, tuple)
    picked: ir.Value = found[node.args[1]]
    return picked


def _index(e: OnnxEmitter, node: Node) -> Result:
    x, indices = node.args[0], node.args[1]
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or not isinstance(indices[0], fx.Node):
        raise LoweringError("only x[i] with one index tensor is lowered")
    return e.op("Gather", e.value(x), e.value(indices[0]), axis=0)


def _embedding(e: OnnxEmitter, node: Node) -> Result:
    return e.op("Gather", e.value(node.args[0]), e.value(node.args[1]), axis=0)


def _gather(e: OnnxEmitter, node: Node) -> Result:
    x, dim, index = (argument(node, n) for n in ("self", "dim", "index"))
    return e.op("GatherElements", e.value(x), e.value(index), axis=dim)


def _select(e: OnnxEmitter, node: Node) -> Result:
    x, dim, index = (argument(node, n) for n in ("self", "dim", "index"))
    return e.op("Gather", e.value(x), e.value_of(index, torch.int64), axis=dim)


def _compare(kind: str, negated: bool = False) -> Lowering:
    """A comparison with a value or a number of the operand's type."""

    def lower(e: OnnxEmitter, node: Node) -> Result:
        x, y = node.args[:2]
        result = e.op(kind, e.value(x), e.value_of(y, e.graph.dtype(x)))
        return e.op("Not", result) if negated else result

    return lower


def _conv1d(e: OnnxEmitter, node: Node) -> Result:
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


def _cumsum(e: OnnxEmitter, node: Node) -> Result:
    return e.op("CumSum", e.value(node.args[0]), e.numbers(argument(node, "dim"), torch.int64))


def _clamp_to(e: OnnxEmitter, node: Node) -> Result:
    bounds = [argument(node, name) for name in ("min", "max")]
    values = [None if bound is None else e.value(bound) for bound in bounds]
    return e.op("Clip", e.value(node.args[0]), *values)


def _cast(e: OnnxEmitter, node: Node) -> Result:
    dtype = e.graph.dtype(node)
    if dtype not in _CASTS:
        raise LoweringError(f"no cast to {dtype} is lowered")
    return e.op("Cast", e.value(node.args[0]), to=_CASTS[dtype])


STANDARD: dict[str, Lowering] = {
    "add": _scaled("Add"), "sub": _scaled("Sub"), "mul": _arithmetic("Mul"), "div": _arithmetic("Div"),
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
    "to": _cast, "type_as": _cast,
    "fake_quantize": fake_quantize, "fake_quantize_static": fake_quantize_static,
    **RESHAPING, "hadamard": hadamard, "kronecker": kronecker,
}  # fmt: skip
