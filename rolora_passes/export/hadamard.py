"""Hadamard matrices as the few products that a runtime multiplies fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from rolora_passes.graphs import hadamard

_DENSE_ORDER = 128  # up to here one product is as fast as several
_FACTOR_ORDER = 48  # beyond, Kronecker factors of at most this order


def few_factors(order: int) -> list[Tensor]:
    """The matrix as a Kronecker product of few matrices; as itself, if it is small."""
    limit = _DENSE_ORDER if order <= _DENSE_ORDER else _FACTOR_ORDER
    factors = [torch.ones(1, 1)]
    for matrix in reversed(hadamard.factors(order, limit=2)):
        if len(matrix) * len(factors[0]) > limit:
            factors.insert(0, torch.ones(1, 1))
        factors[0] = torch.kron(matrix.float(), factors[0])
    return factors
