"""Hadamard matrices, constructed rather than stored, and the fast orthonormal transform.

A Hadamard matrix has entries +-1 and orthogonal rows. Here order = K * 2^m and

    matrix(order) = H_K (x) H_2 (x) ... (x) H_2        (Kronecker; K is the slow axis)

with the smallest K that one of these constructs directly. Matrices of one order from two sources are
in general different, so whatever is folded into weights and whatever runs online must share this
module, or the record that `describe` returns.

* sylvester: K = 1 (Sylvester 1867).
* paley1(q), K = q + 1, and paley2(q), K = 2 (q + 1): q a prime power, 3 and 1 modulo 4 (Paley 1933).
* williamson(n), K = 4 n: four symmetric circulants (Williamson 1944), lags found by search.
* goethals_seidel(t, n), K = 4 t n: the same circulants in the array of Goethals and Seidel (1967),
  mixed along t-sequences (Cooper and Wallis 1972). Order 156, for one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_Rows = list[list[int]]

# Lags at which the four symmetric +-1 sequences of length n are +1, besides lag 0.
_WILLIAMSON = {
    13: ((1, 2, 3, 5), (1, 5), (1, 5), (4, 6)),
    23: ((2, 5, 6, 7, 8, 9), (2, 3, 4, 7, 8, 10), (3, 4, 6, 8), (1, 2, 3, 4, 6, 7, 11)),
    25: (
        (1, 2, 3, 4, 5, 9, 11),
        (1, 2, 4, 7, 8, 9, 12),
        (1, 3, 6, 7, 9, 11, 12),
        (2, 3, 4, 7, 10, 11, 12),
    ),
    29: (
        (1, 3, 4, 5, 8, 10, 11),
        (1, 3, 5, 6, 7, 9, 10, 12),
        (3, 4, 5, 8, 9, 11),
        (1, 2, 4, 8, 9, 10, 11, 13, 14),
    ),
    43: (
        (1, 2, 3, 4, 6, 7, 12, 14, 15, 18, 19, 21),
        (1, 2, 6, 7, 10, 12, 14, 16, 17),
        (1, 3, 5, 6, 7, 8, 10, 13, 16, 17, 18, 21),
        (2, 3, 9, 10, 11, 12, 14, 16, 17, 18, 20, 21),
    ),
}
# T-sequences of length t: position r belongs to sequence |c|, with the sign of c.
_T_SEQUENCES = {1: (1,), 3: (1, 2, 3), 5: (1, 2, 2, 3, -3)}
_QUATERNION = ((1, 2, 3, 4), (-2, 1, 4, -3), (-3, -4, 1, 2), (-4, 3, -2, 1))

_RADIX = 32  # factor size of the transform: few multiplications, still efficient small GEMMs
_CHUNK = 1 << 22  # elements transformed at a time: few enough for the cache, so many that threads rarely wait


class _Base(NamedTuple):
    """A direct construction, that is, not a doubling."""

    order: int
    name: str
    build: Callable[[], _Rows]


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
    """JSON-able record of which Hadamard matrix of this order this is, for a manifest.

    Raises: ValueError: no known construction.
    """
    base, m = _require(order)
    return {
        "order": order,
        "constructor": base.name,
        "K": base.order,
        "m": m,
        "axes": "kron(H_K, H_2^m), K slow",
    }


def matrix(order: int) -> Tensor:
    """The Hadamard matrix, not normalised: int8 [order, order] of +-1, a new tensor.

    Raises: ValueError: no known construction.
    """
    return functools.reduce(torch.kron, factors(order))


def factors(order: int, limit: int = 64) -> list[Tensor]:
    """Square +-1 int8 matrices F_1 .. F_r whose Kronecker product, in this order, is `matrix(order)`.

    Args:
        limit: largest size of a factor, at least 2. H_K is one factor even if K exceeds it.

    Raises: ValueError: no known construction.
    """
    return [torch.tensor(rows, dtype=torch.int8, device="cpu") for rows in _factor_rows(order, limit)]


def transform(x: Tensor, order: int, dim: int = -1, inner: int = 1) -> Tensor:
    """Multiply an axis, or one factor of it, by matrix(order) / sqrt(order), in O(n log n).

    Axis `dim` is read row-major as (outer, order, inner);
    y[.., j, ..] = sum_i x[.., i, ..] * matrix(order)[i, j] / sqrt(order).

    Args:
        x: any floating dtype and device. Half precisions are computed in float32.

    Returns: shape and dtype of x. Differentiable; traces as a few matrix products.

    Raises: ValueError: no known construction, order * inner does not divide the axis, or x is not real
        floating point.
    """
    _require(order)
    dim, size = dim % x.dim(), x.shape[dim]
    if inner < 1 or size % (order * inner):
        raise ValueError(
            f"axis {dim} of {list(x.shape)}: {size} is not a multiple of order {order} * inner {inner}"
        )
    if not x.is_floating_point():
        raise ValueError(f"expected a floating dtype, found {x.dtype}")
    outer, right = math.prod(x.shape[:dim]) * (size // (order * inner)), inner * math.prod(x.shape[dim + 1 :])
    split = x.reshape(outer, order, right)
    eager = type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta and not torch.compiler.is_compiling()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    constants = (_constants if eager else _constants.__wrapped__)(order, dtype, x.device)
    if not eager or x.numel() <= _CHUNK or (x.requires_grad and torch.is_grad_enabled()):
        return _multiply(split.to(dtype), constants).to(x.dtype).reshape(x.shape)
    y = torch.empty_like(split, memory_format=torch.contiguous_format)
    rows = max(1, _CHUNK // (order * right))
    columns = max(1, _CHUNK // (order * rows))
    for x_rows, y_rows in zip(split.split(rows), y.split(rows), strict=True):
        for source, target in zip(x_rows.split(columns, 2), y_rows.split(columns, 2), strict=True):
            target.copy_(_multiply(source.to(dtype), constants))
    return y.reshape(x.shape)


def _multiply(x: Tensor, constants: list[Tensor]) -> Tensor:
    """x [outer, order, right], its middle axis times the Kronecker product of `constants`."""
    shape, right = x.shape, x.shape[2]
    sizes = [factor.shape[0] for factor in constants]
    for i in reversed(range(len(sizes))):
        k, left = sizes[i], shape[0] * math.prod(sizes[:i])
        if isinstance(right, int) and right == 1:
            x = x.reshape(left, k) @ constants[i]
        else:  # bmm and not matmul, which may fold the batch by copying a transpose
            x = torch.bmm(constants[i].T.expand(left, k, k), x.reshape(left, k, right))
        right *= k
    return x.reshape(shape)


@functools.cache
def _constants(order: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The factors of the orthonormal matrix. A tracer calls the uncached function: its tensors are its own."""
    first, *rest = _factor_rows(order, _RADIX)
    scaled = [[sign / math.sqrt(order) for sign in row] for row in first]
    with torch.inference_mode(False):
        return [torch.tensor(rows, dtype=dtype, device=device) for rows in (scaled, *rest)]


def _factor_rows(order: int, limit: int) -> list[_Rows]:
    """H_K enlarged by doubling while it fits `limit`, then even powers of two."""
    if limit < 2:
        raise ValueError(f"expected a limit of at least 2, found {limit}")
    base, m = _require(order)
    absorbed = min(m, max(0, (limit // base.order).bit_length() - 1)) if base.order > 1 else 0
    count = math.ceil((m - absorbed) / (limit.bit_length() - 1))
    powers = [(m - absorbed + i) // count for i in range(count)]
    head = [_kron(base.build(), _sylvester(1 << absorbed))] if base.order > 1 or not powers else []
    return head + [_sylvester(1 << power) for power in powers]


def _require(order: int) -> tuple[_Base, int]:
    """The construction of H_K, and m."""
    found = _split(order)
    if found is None:
        block = f"; the largest usable order dividing it is {largest_order(order)}" if order > 0 else ""
        raise ValueError(f"no known construction of a Hadamard matrix of order {order}{block}")
    return found


@functools.cache
def _split(order: int) -> tuple[_Base, int] | None:
    if order < 1:
        return None
    for m in reversed(range((order & -order).bit_length())):
        if base := _base(order >> m):
            return base, m
    return None


def _base(k: int) -> _Base | None:
    if k == 1:
        return _Base(k, "sylvester", functools.partial(_sylvester, 1))
    if k % 4:
        return None
    if field := _prime_power(k - 1):
        return _Base(k, f"paley1(q={k - 1})", functools.partial(_paley1, *field))
    if k % 8 == 4 and (field := _prime_power(k // 2 - 1)):
        return _Base(k, f"paley2(q={k // 2 - 1})", functools.partial(_paley2, *field))
    for t in _T_SEQUENCES:
        n = k // (4 * t)
        if k == 4 * t * n and n in _WILLIAMSON:
            name = f"williamson(n={n})" if t == 1 else f"goethals_seidel(t={t}, n={n})"
            return _Base(k, name, functools.partial(_goethals_seidel, t, n))
    return None


# The builders keep plain integers: a tensor cached under a tracing mode would belong to that mode.


def _sylvester(size: int) -> _Rows:
    return [[1 - 2 * ((i & j).bit_count() % 2) for j in range(size)] for i in range(size)]


def _kron(a: _Rows, b: _Rows) -> _Rows:
    return [[x * y for x in a_row for y in b_row] for a_row in a for b_row in b]


@functools.cache
def _paley1(p: int, degree: int) -> _Rows:
    """I + S, with S = [[0, 1], [-1, Q]] skew."""
    rows = [[1] * (p**degree + 1)] + [[-1, *row] for row in _jacobsthal(p, degree)]
    return [[1 if i == j else entry for j, entry in enumerate(row)] for i, row in enumerate(rows)]


@functools.cache
def _paley2(p: int, degree: int) -> _Rows:
    """C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], with C = [[0, 1], [1, Q]] symmetric."""
    c = [[0] + [1] * p**degree] + [[1, *row] for row in _jacobsthal(p, degree)]
    off_diagonal = _kron(c, [[1, 1], [1, -1]])
    diagonal = [[1, -1], [-1, -1]]
    return [
        [diagonal[i % 2][j % 2] if i // 2 == j // 2 else entry for j, entry in enumerate(row)]
        for i, row in enumerate(off_diagonal)
    ]


def _jacobsthal(p: int, degree: int) -> _Rows:
    """Q_ab = chi(a - b), chi the quadratic character of GF(p^degree), elements as base-p digits."""
    chi = _quadratic_character(p, degree)
    return [[chi[tuple((a - b) % p for a, b in zip(x, y, strict=True))] for y in chi] for x in chi]


def _quadratic_character(p: int, degree: int) -> dict[tuple[int, ...], int]:
    """+1, -1, +1 .. along the powers of x in GF(p)[x] / (x^degree - tail), for a tail where x is primitive."""
    one, zero = (1, *[0] * (degree - 1)), (0,) * degree
    for tail in itertools.product(range(p), repeat=degree):
        chi, power = {zero: 0}, one
        while power not in chi:
            chi[power] = (-1) ** (len(chi) - 1)
            power = tuple((low + power[-1] * c) % p for low, c in zip((0, *power[:-1]), tail, strict=True))
        if len(chi) == p**degree and power == one:
            return chi
    raise AssertionError("every finite field has a primitive element")


def _prime_power(q: int) -> tuple[int, int] | None:
    """p and e of q = p^e, p prime."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    e = round(math.log(q, p))
    return (p, e) if p**e == q else None


@functools.cache
def _goethals_seidel(t: int, n: int) -> _Rows:
    """The Goethals-Seidel array over the group Z_t x Z_n.

    Its four functions on the group, f_e(r, i), are the Williamson sequences of i, chosen by r.
    """

    def value(e: int, r: int, i: int) -> int:
        position = _T_SEQUENCES[t][r % t]
        chosen = _QUATERNION[e][abs(position) - 1]
        positive = i % n == 0 or min(i % n, -i % n) in _WILLIAMSON[n][abs(chosen) - 1]
        return int(math.copysign(1, position * chosen)) * (1 if positive else -1)

    def entry(u: int, v: int, a: tuple[int, int], b: tuple[int, int]) -> int:
        """Block (u, v) is +-X, +-Y R (first row or column) or +-Y^T R, R the reversal g -> -g."""
        chosen = _QUATERNION[u][v]
        if u == v:
            difference = (b[0] - a[0], b[1] - a[1])
        else:
            flip = -1 if u == 0 or v == 0 else 1
            difference = (flip * (a[0] + b[0]), flip * (a[1] + b[1]))
        return int(math.copysign(1, chosen)) * value(abs(chosen) - 1, *difference)

    group = list(itertools.product(range(t), range(n)))
    indices = [(u, a) for u in range(4) for a in group]
    return [[entry(u, v, a, b) for v, b in indices] for u, a in indices]
