"""Online Hadamard transforms as nodes of an XNNPACK delegate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from rolora_passes.export.shapes import Shape
from rolora_passes.export.xnnpack_emitter import Emitter
from rolora_passes.export.xnnpack_ops import EMITTERS, permute, reshape
from rolora_passes.graphs import hadamard
from rolora_passes.graphs.graph import argument

# One product by a dense matrix is faster than two smaller ones and a transposition up to this order.
_DENSE_ORDER = 128


def _hadamard(e: Emitter, node: fx.Node) -> int:
    """Multiply the factor `order` of an axis read as (outer, order, inner)."""
    x, shape = e.value(node.args[0]), e.shape(node)
    order, inner = int(argument(node, "order")), int(argument(node, "inner"))
    dim = int(argument(node, "dim")) % len(shape)
    size = shape[dim]
    assert size is not None
    outer = size // (order * inner)
    if dim == len(shape) - 1 and inner == 1:
        rows = shape[:-1] if outer == 1 else (*shape[:-1], outer)
        return reshape(e, _last_axis(e, _shaped(e, x, (*rows, order)), order), shape)
    split = (*shape[:dim], outer, order, inner, *shape[dim + 1 :])
    moved = [d for d in range(len(split)) if d != dim + 1] + [dim + 1]
    turned = _last_axis(e, permute(e, reshape(e, x, split), moved), order)
    back = sorted(range(len(moved)), key=moved.__getitem__)
    return reshape(e, permute(e, turned, back), shape)


def _shaped(e: Emitter, x: int, shape: Shape) -> int:
    return x if e.delegate.shapes[x] == shape else reshape(e, x, shape)


def _last_axis(e: Emitter, x: int, order: int) -> int:
    """x H over the last axis, H dense or as two Kronecker factors: [.., a, b] -> A^T [.., a, b] B."""
    left, right = _split(order)
    right = right / math.sqrt(order)
    rows = e.delegate.shapes[x][:-1]
    if left is None:
        return e.delegate.linear(x, e.delegate.constant(right.T))
    a, b = left.shape[0], right.shape[0]
    within = e.delegate.linear(reshape(e, x, (*rows, a, b)), e.delegate.constant(right.T))
    rank = len(rows) + 2
    swap = [*range(rank - 2), rank - 1, rank - 2]
    across = e.delegate.linear(permute(e, within, swap), e.delegate.constant(left.T))
    return reshape(e, permute(e, across, swap), (*rows, order))


def _split(order: int) -> tuple[Tensor | None, Tensor]:
    """Two factors of the Hadamard matrix, nearly equal in size; or the matrix, if it is small."""
    matrices = [f.float() for f in hadamard.factors(order)]
    if order <= _DENSE_ORDER or len(matrices) == 1:
        return None, _product(matrices)

    def cost(at: int) -> int:
        return math.prod(len(f) for f in matrices[:at]) + math.prod(len(f) for f in matrices[at:])

    best = min(range(1, len(matrices)), key=cost)
    return _product(matrices[:best]), _product(matrices[best:])


def _product(matrices: list[Tensor]) -> Tensor:
    result = torch.ones(1, 1)
    for matrix in matrices:
        result = torch.kron(result, matrix)
    return result


EMITTERS["rolora.hadamard"] = _hadamard
