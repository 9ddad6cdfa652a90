"""Lowerings of rotations at run time: products with the factors of a Hadamard or Kronecker matrix."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch

from rolora_passes.export.onnx.emitter import Heads, OnnxEmitter, Result
from rolora_passes.export.onnx.prepared import Node
from rolora_passes.export.onnx.reshaping import tail
from rolora_passes.graphs.graph import argument
from rolora_passes.numerics.hadamard import few_factors


def hadamard(e: OnnxEmitter, node: Node) -> Result:
    return _transform(e, node, few_factors(argument(node, "order")), argument(node, "inner"))


def kronecker(e: OnnxEmitter, node: Node) -> Result:
    return _transform(e, node, [e.graph.parameter(factor) for factor in node.args[1]], 1)


def _transform(e: OnnxEmitter, node: Node, factors: list[torch.Tensor], inner: int) -> Result:
    """One product for every Kronecker factor; an axis is read as (outer, order, inner)."""
    x = node.args[0]
    dim, rank = argument(node, "dim") % e.rank(x), e.rank(x)
    rest = tail(e, x, dim)
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


def _matrix(e: OnnxEmitter, factor: torch.Tensor) -> ir.Value:
    key = ("hadamard", tuple(map(tuple, factor.tolist())))
    if key not in e.shared:
        e.shared[key] = e.store.add(f"hadamard_{len(factor)}", factor.float().contiguous())
    return e.shared[key]
