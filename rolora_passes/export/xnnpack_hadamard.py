"""Online Hadamard transforms as nodes of an XNNPACK delegate.

Measured on R4 of order 1536, 128 tokens: linear and batched product 170 us, the same as two linears
between transposes 202, as three factors 180, by slices and butterflies 199, dense 15 times as much.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from rolora_passes.export.xnnpack_emitter import Emitter
from rolora_passes.export.xnnpack_ops import EMITTERS, matmul, reshape
from rolora_passes.graphs import hadamard
from rolora_passes.graphs.graph import argument

_DENSE_ORDER = 128  # up to here one product is as fast as several
_FACTOR_ORDER = 48  # beyond, Kronecker factors of at most this order


def _hadamard(e: Emitter, node: fx.Node) -> int:
    """Multiply the factor `order` of an axis read as (outer, order, inner), by one matrix after another."""
    x, shape = e.value(node.args[0]), e.shape(node)
    order, inner = int(argument(node, "order")), int(argument(node, "inner"))
    dim = int(argument(node, "dim")) % len(shape)
    right = inner * math.prod(size or 0 for size in shape[dim + 1 :])
    for factor in reversed(_factors(order)):
        x = _multiply(e, x, factor / math.sqrt(len(factor)), right)
        right *= len(factor)
    return reshape(e, x, shape)


def _multiply(e: Emitter, x: int, factor: Tensor, right: int) -> int:
    """x read as (left, k, right), its middle axis times a k x k matrix."""
    k = len(factor)
    if right == 1:
        return e.delegate.linear(reshape(e, x, (None, k)), e.delegate.constant(factor.T))
    return matmul(e, e.delegate.constant(factor.T[None]), reshape(e, x, (None, k, right)), (None, k, right))


def _factors(order: int) -> list[Tensor]:
    """The matrix as a Kronecker product of few matrices; as itself, if it is small."""
    limit = _DENSE_ORDER if order <= _DENSE_ORDER else _FACTOR_ORDER
    factors = [torch.ones(1, 1)]
    for matrix in reversed(hadamard.factors(order, limit=2)):
        if len(matrix) * len(factors[0]) > limit:
            factors.insert(0, torch.ones(1, 1))
        factors[0] = torch.kron(matrix.float(), factors[0])
    return factors


EMITTERS["rolora.hadamard"] = _hadamard
