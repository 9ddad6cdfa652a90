"""Online Hadamard transforms as nodes of an XNNPACK delegate.

Measured on R4 of order 1536, 128 tokens: linear and batched product 170 us, the same as two linears
between transposes 202, as three factors 180, by slices and butterflies 199, dense 15 times as much.
"""

from __future__ import annotations

import math

from torch import Tensor, fx

from rolora_passes.export.executorch.xnnpack.emitter import DelegateEmitter
from rolora_passes.graphs.graph import argument
from rolora_passes.numerics.hadamard import few_factors


def hadamard(e: DelegateEmitter, node: fx.Node) -> int:
    return _transform(e, node, few_factors(int(argument(node, "order"))), int(argument(node, "inner")))


def kronecker(e: DelegateEmitter, node: fx.Node) -> int:
    return _transform(e, node, [e.tensor(factor) for factor in node.args[1]], 1)  # type: ignore[union-attr, arg-type]


def _transform(e: DelegateEmitter, node: fx.Node, factors: list[Tensor], inner: int) -> int:
    """Multiply a factor of an axis read as (outer, order, inner), by one matrix after another."""
    x, shape = e.value(node.args[0]), e.shape(node)
    dim = int(argument(node, "dim")) % len(shape)
    right = inner * math.prod(size or 0 for size in shape[dim + 1 :])
    for factor in reversed(factors):
        x = _multiply(e, x, factor, right)
        right *= len(factor)
    return e.delegate.reshape(x, shape)


def _multiply(e: DelegateEmitter, x: int, factor: Tensor, right: int) -> int:
    """x read as (left, k, right), its middle axis times a k x k matrix."""
    d, k = e.delegate, len(factor)
    if right == 1:
        return d.linear(d.reshape(x, (None, k)), d.constant(factor.T))
    return d.matmul(d.constant(factor.T[None]), d.reshape(x, (None, k, right)), (None, k, right))
