"""Hadamard matrices that no smaller one yields by doubling, each computed from a few integers.

* sylvester: 2^m (Sylvester 1867).
* paley1(q), order q + 1, and paley2(q), order 2 (q + 1): q a prime power, 3 and 1 modulo 4 (Paley 1933).
* williamson(n), order 4 n: four symmetric circulants (Williamson 1944), their lags found by search.
* goethals_seidel(t, n), order 4 t n: the same circulants in the array of Goethals and Seidel (1967),
  spread over t-sequences (Cooper and Wallis 1972). Order 156, for one.

Everything is plain integers: a tensor cached while a tracing mode is active would belong to that mode.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

Rows = list[list[int]]

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
# Four t-sequences in one: position r belongs to sequence |c|, with the sign of c.
_T_SEQUENCES = {1: (1,), 3: (1, 2, 3), 5: (1, 2, 2, 3, -3)}
_QUATERNION = ((1, 2, 3, 4), (-2, 1, 4, -3), (-3, -4, 1, 2), (-4, 3, -2, 1))


class Construction(NamedTuple):
    """How to build one matrix. `build` returns a shared object: read it only."""

    order: int
    name: str
    build: Callable[[], Rows]


def find(order: int) -> Construction | None:
    """The construction of this order that is not a doubling, if one is known. Builds nothing."""
    if order == 1:
        return Construction(1, "sylvester", functools.partial(sylvester, 1))
    if order < 1 or order % 4:
        return None
    q = order - 1
    if field := _prime_power(q):
        return Construction(order, f"paley1(q={q})", functools.partial(_paley1, *field))
    q = order // 2 - 1
    if q % 4 == 1 and (field := _prime_power(q)):
        return Construction(order, f"paley2(q={q})", functools.partial(_paley2, *field))
    for t in _T_SEQUENCES:
        n = order // (4 * t)
        if order == 4 * t * n and n in _WILLIAMSON:
            name = f"williamson(n={n})" if t == 1 else f"goethals_seidel(t={t}, n={n})"
            return Construction(order, name, functools.partial(_goethals_seidel, t, n))
    return None


def sylvester(order: int) -> Rows:
    """H_2 (x) ... (x) H_2, order a power of two: the sign is the parity of i & j."""
    return [[1 - 2 * ((i & j).bit_count() % 2) for j in range(order)] for i in range(order)]


def kron(a: Rows, b: Rows) -> Rows:
    """The Kronecker product."""
    return [[x * y for x in a_row for y in b_row] for a_row in a for b_row in b]


@functools.cache
def _paley1(p: int, degree: int) -> Rows:
    """I + S, with S = [[0, 1], [-1, Q]] skew."""
    rows = [[0] + [1] * p**degree] + [[-1, *row] for row in _jacobsthal(p, degree)]
    return [[1 if i == j else entry for j, entry in enumerate(row)] for i, row in enumerate(rows)]


@functools.cache
def _paley2(p: int, degree: int) -> Rows:
    """C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], with C = [[0, 1], [1, Q]] symmetric."""
    conference = [[0] + [1] * p**degree] + [[1, *row] for row in _jacobsthal(p, degree)]
    diagonal = ((1, -1), (-1, -1))
    return [
        [diagonal[i % 2][j % 2] if i // 2 == j // 2 else entry for j, entry in enumerate(row)]
        for i, row in enumerate(kron(conference, [[1, 1], [1, -1]]))
    ]


def _jacobsthal(p: int, degree: int) -> Rows:
    """Q_xy = chi(x - y), chi the quadratic character of GF(p^degree)."""
    chi = _quadratic_character(p, degree)
    return [[chi[tuple((a - b) % p for a, b in zip(x, y, strict=True))] for y in chi] for x in chi]


def _quadratic_character(p: int, degree: int) -> dict[tuple[int, ...], int]:
    """+1, -1, +1 .. along the powers of x in GF(p)[x] / (x^degree - tail), for a tail that makes x primitive.

    An element is the tuple of its coefficients, lowest first.
    """
    one, zero = (1, *[0] * (degree - 1)), (0,) * degree
    for tail in itertools.product(range(p), repeat=degree):
        chi, power = {zero: 0}, one
        while power not in chi:
            chi[power] = 1 if len(chi) % 2 else -1
            power = tuple((low + power[-1] * c) % p for low, c in zip((0, *power[:-1]), tail, strict=True))
        if power == one and len(chi) == p**degree:
            return chi
    raise AssertionError(f"GF({p}^{degree}) has a primitive element")


def _prime_power(q: int) -> tuple[int, int] | None:
    """The p and e of q = p^e, p prime."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    e = round(math.log(q, p))
    return (p, e) if p**e == q else None


@functools.cache
def _goethals_seidel(t: int, n: int) -> Rows:
    """[[X, YR, ZR, WR], [-YR, X, W'R, -Z'R], [-ZR, -W'R, X, Y'R], [-WR, Z'R, -Y'R, X]].

    X_ab = x(b - a) for a function x on the group Z_t x Z_n, R is the reversal of the group, ' transposes.
    At (r, i) the four functions are the Williamson sequences at i, permuted as quaternions by the
    t-sequence that r belongs to. For t = 1 this is Williamson's array up to order and sign of rows.
    """

    def function(e: int, r: int, i: int) -> int:
        position = _T_SEQUENCES[t][r % t]
        chosen = _QUATERNION[e][abs(position) - 1]
        lag = min(i % n, -i % n)
        sign = 1 if lag == 0 or lag in _WILLIAMSON[n][abs(chosen) - 1] else -1
        return sign if position * chosen > 0 else -sign

    def entry(u: int, a: tuple[int, int], v: int, b: tuple[int, int]) -> int:
        chosen = _QUATERNION[u][v]
        head, tail = (1, -1) if u == v else (-1, -1) if u == 0 or v == 0 else (1, 1)
        sign = function(abs(chosen) - 1, head * b[0] + tail * a[0], head * b[1] + tail * a[1])
        return sign if chosen > 0 else -sign

    index = list(itertools.product(range(4), itertools.product(range(t), range(n))))
    return [[entry(u, a, v, b) for v, b in index] for u, a in index]
