"""Hadamard matrices of order K * 2^m, constructed rather than stored, and the fast orthonormal transform.

A Hadamard matrix has entries +-1 and orthogonal rows. Here

    matrix(K * 2^m) = H_K (x) H_2 (x) ... (x) H_2        (Kronecker: K is the slow axis)

with the smallest K that `hadamard_constructions` builds directly. Matrices of one order from two sources
differ in general, so what is folded into weights and what runs online must both come from here, or from
the record that `describe` returns.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from rolora_passes.numerics import constructions, cuda_hadamard

_DENSE_ORDER = 128  # up to here one product is as fast as several, in the runtimes' kernels
_FACTOR_ORDER = 48  # beyond, Kronecker factors of at most this order
# Factor size of the transform: few multiplications, and still efficient small products.
_RADIX = {torch.float64: 16, torch.float32: 32}
_WIDE = 32  # elements behind an axis from which on products of batches are fast
_CHUNK = 1 << 17  # elements that a thread transforms at a time: what stays in its cache
_CHUNK_ELSEWHERE = 1 << 24  # on other devices: what keeps them busy, and the working memory bounded


def constructible(order: int) -> bool:
    """Whether `matrix(order)` exists. Builds nothing."""
    return _split(order) is not None


def largest_order(n: int) -> int:
    """The largest constructible order that divides n: the block of a block-diagonal Hadamard.

    Raises: ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"expected a positive size, found {n}")
    return next(n // d for d in range(1, n + 1) if n % d == 0 and constructible(n // d))


def describe(order: int) -> dict[str, object]:
    """JSON-able record of which Hadamard matrix of this order `matrix` is, for a manifest.

    Raises: ValueError: no known construction.
    """
    base, m = _require(order)
    axes = "kron(H_K, H_2^m), K slow"
    return {"order": order, "constructor": base.name, "K": base.order, "m": m, "axes": axes}


def matrix(order: int) -> Tensor:
    """The Hadamard matrix, not normalised: a new int8 tensor [order, order] of +-1.

    Raises: ValueError: no known construction.
    """
    return functools.reduce(torch.kron, factors(order))


def factors(order: int, limit: int = 64) -> list[Tensor]:
    """Square +-1 int8 matrices F_1 .. F_r whose Kronecker product, in this order, is `matrix(order)`.

    Args:
        limit: largest size of a factor, at least 2; but H_K is never divided, even if K exceeds it.

    Raises: ValueError: no known construction, or limit < 2.
    """
    return [torch.tensor(rows, dtype=torch.int8, device="cpu") for rows in _factor_rows(order, limit)]


def few_factors(order: int) -> list[Tensor]:
    """The orthonormal matrix as the few products that a runtime multiplies fastest.

    Returns: float64 orthogonal matrices F_1 .. F_r whose Kronecker product, in this order, is
        `matrix(order) / sqrt(order)`; one, if it is small.

    Raises: ValueError: no known construction.
    """
    limit = _DENSE_ORDER if order <= _DENSE_ORDER else _FACTOR_ORDER
    found = [torch.ones(1, 1, dtype=torch.float64)]
    for signs in reversed(factors(order, limit=2)):
        if len(signs) * len(found[0]) > limit:
            found.insert(0, torch.ones(1, 1, dtype=torch.float64))
        found[0] = torch.kron(signs.double(), found[0])
    return [matrix / math.sqrt(len(matrix)) for matrix in found if len(matrix) > 1 or order == 1]


def transform(x: Tensor, order: int, dim: int = -1, inner: int = 1, signs: Tensor | None = None) -> Tensor:
    """Multiply an axis, or one factor of it, by matrix(order) / sqrt(order), in O(n log n).

    Axis `dim` is read row-major as (outer, order, inner), and
    y[.., j, ..] = sum_i x[.., i, ..] * matrix(order)[i, j] / sqrt(order).

    Args:
        x: any shape, floating dtype and device. Half precisions are computed in float32. On CUDA the last
            axis goes through `fast_hadamard_transform` where that is installed (extra "cuda").
        signs: [blocks * order], multiplied into the axis first, which is then read as
            (outer, blocks, order, inner).

    Returns: a new tensor, shape and dtype of x. Differentiable; traces as a few matrix products.

    Raises: ValueError: no known construction, order * inner (times blocks) does not divide the axis, or x
        is not a real floating tensor.
    """
    base, m = _require(order)
    dim, size, blocks = dim % x.dim(), x.shape[dim], 1 if signs is None else len(signs) // order
    if inner < 1 or size % (order * inner * blocks):
        raise ValueError(f"order {order} * inner {inner} does not divide axis {dim} of {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"expected a floating dtype, found {x.dtype}")
    right = inner * math.prod(x.shape[dim + 1 :])
    outer = math.prod(x.shape[:dim]) * (size // (order * inner * blocks))
    split = x.reshape(outer, blocks, order, right)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if signs is not None:
        signs = signs.to(dtype).reshape(blocks, order, 1)
    eager = type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and not torch.compiler.is_compiling()
    if eager and cuda_hadamard.serves(x, m, right):
        given = x if signs is None else (split * signs).to(x.dtype)
        return cuda_hadamard.transform(given.reshape(-1, order), base, m).reshape(x.shape)
    orthonormal = (_orthonormal if eager else _orthonormal.__wrapped__)(order, dtype, x.device)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, signs))
    if eager and not recorded and x.numel() > (chunk := _chunk(x.device)):
        return _multiply_in_chunks(split, orthonormal, signs, chunk).reshape(x.shape)
    split = split.to(dtype) if signs is None else split * signs
    return _multiply(split.flatten(0, 1), orthonormal).to(x.dtype).reshape(x.shape)


def multiply(x: Tensor, matrices: list[Tensor], dim: int = -1, inner: int = 1) -> Tensor:
    """Multiply an axis by the Kronecker product of square matrices, in their own sizes' time.

    Axis `dim` is read row-major as (outer, n, inner), n the product of the sizes, and
    y[.., j, ..] = sum_i x[.., i, ..] * (M_1 (x) .. (x) M_r)[i, j].

    Args:
        x: any shape and floating dtype, to which the matrices are cast.

    Returns: a new tensor, shape of x. Differentiable in x and in the matrices.
    """
    dim, order = dim % x.dim(), math.prod(len(m) for m in matrices)
    right = inner * math.prod(x.shape[dim + 1 :])
    left = math.prod(x.shape[:dim]) * (x.shape[dim] // (order * inner))
    return _multiply(x.reshape(left, order, right), [m.to(x) for m in matrices]).reshape(x.shape)


def _multiply(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """x [outer, order, right], its middle axis times the Kronecker product of `matrices`; may be a view."""
    outer, order, right = shape = x.shape
    if right < _WIDE and x.dtype == torch.float64:  # in narrower types this gains less than it costs
        x = x.transpose(1, 2)
        for factor in reversed(matrices):  # the fastest factor of the axis becomes the slowest, so that
            # each product is of a small matrix with one long one, and all are in order after the last
            x = factor.t() @ x.reshape(-1, len(factor)).t()
        return x.reshape(order, outer, right).transpose(0, 1)
    left = outer * order
    for factor in reversed(matrices):
        k = len(factor)
        left //= k
        if right == 1:
            x = x.reshape(left, k) @ factor
        else:  # bmm and not matmul, which may fold the batch by copying a transpose
            x = torch.bmm(factor.t().expand(left, k, k), x.reshape(left, k, right))
        right *= k
    return x.reshape(shape)


def _chunk(device: torch.device) -> int:
    return _CHUNK * torch.get_num_threads() if device.type == "cpu" else _CHUNK_ELSEWHERE


def _multiply_in_chunks(x: Tensor, matrices: list[Tensor], signs: Tensor | None, chunk: int) -> Tensor:
    """x [outer, blocks, order, right] times signs, and `_multiply`, into one new tensor.

    Chunk by chunk, so that what passes between the first read and the last write stays in the cache.
    """
    outer, blocks, order, right = x.shape
    columns = max(1, min(right, max(_WIDE, chunk // order)))
    rows = max(1, min(outer, chunk // (order * columns)))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for b in range(blocks):
        for i in range(0, outer, rows):
            for j in range(0, right, columns):
                part = (slice(i, i + rows), b, slice(None), slice(j, j + columns))
                source = x[part].to(matrices[0].dtype) if signs is None else x[part] * signs[b]
                y[part].copy_(_multiply(source.contiguous(), matrices))
    return y


@functools.cache
def _orthonormal(order: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Factors of matrix(order) / sqrt(order). Tracers call the uncached function: tensors are theirs."""
    first, *rest = _factor_rows(order, _RADIX[dtype])
    scaled = [[sign / math.sqrt(order) for sign in row] for row in first]
    with torch.inference_mode(False):
        return [torch.tensor(rows, dtype=dtype, device=device) for rows in (scaled, *rest)]


def _factor_rows(order: int, limit: int) -> list[constructions.Rows]:
    """H_K, doubled while it fits the limit; then powers of two of about one size."""
    if limit < 2:
        raise ValueError(f"expected a limit of at least 2, found {limit}")
    base, m = _require(order)
    doublings = min(m, max(0, (limit // base.order).bit_length() - 1)) if base.order > 1 else 0
    count = math.ceil((m - doublings) / (limit.bit_length() - 1))
    powers = [constructions.sylvester(1 << (m - doublings + i) // count) for i in range(count)]
    if base.order == 1 and powers:
        return powers
    return [constructions.kron(base.build(), constructions.sylvester(1 << doublings)), *powers]


def _require(order: int) -> tuple[constructions.Construction, int]:
    found = _split(order)
    if found is None:
        block = f"; the largest usable order that divides it is {largest_order(order)}" if order > 0 else ""
        raise ValueError(f"no known construction of a Hadamard matrix of order {order}{block}")
    return found


@functools.cache
def _split(order: int) -> tuple[constructions.Construction, int] | None:
    """The construction of H_K and m, of order = K * 2^m with the smallest K."""
    for m in reversed(range((order & -order).bit_length())):
        if base := constructions.find(order >> m):
            return base, m
    return None
