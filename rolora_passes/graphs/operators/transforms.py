"""Transforms of an axis: Hadamard matrices, Kronecker products, rotations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from rolora_passes.graphs.bases.variables import Group, limit
from rolora_passes.graphs.nodes import argument
from rolora_passes.graphs.operators.elementwise import along_axis
from rolora_passes.graphs.operators.places import along
from rolora_passes.graphs.operators.record import Call, Operator, Scope, Trait, Words
from rolora_passes.graphs.operators.steps import AxisMap, Step, WeightReader
from rolora_passes.numerics import hadamard as _hadamard


def hadamard(x: Tensor, order: int, dim: int = -1, inner: int = 1) -> Tensor:
    """Multiply an axis, or one factor of it, by the orthonormal Hadamard matrix of `order`.

    Axis `dim` is read as (outer, order, inner), row-major; y[.., j, ..] = sum_i x[.., i, ..] H[i, j].
    O(n log n); see `rolora_passes.numerics.hadamard` for the orders and constructions.
    """
    return _hadamard.transform(x, order, dim, inner)


def kronecker(x: Tensor, factors: list[Tensor], dim: int = -1) -> Tensor:
    """Multiply an axis, or equal parts of it, by the Kronecker product of square matrices, slow axis first.

    What `hadamard` is with the factors of a Hadamard matrix, at the same cost, but with matrices that are
    parameters.
    """
    return _hadamard.multiply(x, factors, dim)


def rotate(x: Tensor, rotation: Tensor, dim: int = -1, inner: int = 1) -> Tensor:
    """Contract an orthogonal matrix into an axis, or one factor of it: the change of basis.

    Axis `dim` is read as (outer, n, inner); y[.., j, ..] = sum_i x[.., i, ..] R[i, j].

    Args:
        rotation: [n, n], a dense R; or [n], the signs of a randomised Hadamard R = diag(signs) H,
            applied by the fast transform (H in blocks of the largest order that divides n, where
            none of order n is known). Cast to x's dtype.
    """
    rotation = rotation.to(x.dtype)
    if rotation.dim() == 1:
        return _hadamard.transform(x, _hadamard.largest_order(len(rotation)), dim, inner, rotation)
    return _hadamard.multiply(x, [rotation], dim, inner)


def _transform(s: Scope, node: Call) -> Any:
    """hadamard, kronecker: the basis ends here, and that of the matrices is their own."""
    x, dim = list(s.of(node.args[0])), argument(node, "dim")
    for axis in [x[dim], *(axis for matrix in argument(node, "factors", ()) for axis in s.of(matrix))]:
        limit(axis, Group.NONE, node, "is a fixed transform of the axis at run time")
    x[dim] = s.fresh(s.shape(node)[dim], node, "comes out of a fixed transform")
    return x


# What they do to a weight.


def _dim(reader: WeightReader, node: Call) -> int:
    found: int = argument(node, "dim", -1) % len(reader.shape(node.args[0]))
    return found


def _read_hadamard(reader: WeightReader, node: Call) -> list[Step]:
    numbers = (node.args[1], argument(node, "inner", 1))
    return [reader.step(_dim(reader, node), "hadamard", numbers)]


def _read_kronecker(reader: WeightReader, node: Call) -> list[Step]:
    factors = [reader.tensor(f) for f in node.args[1]]
    return [reader.step(_dim(reader, node), "kronecker", (), factors)]


def _read_rotate(reader: WeightReader, node: Call) -> list[Step]:
    rotation = reader.tensor(node.args[1])
    return [reader.step(_dim(reader, node), "rotate", (argument(node, "inner", 1),), (rotation,))]


def _turned_back(x: Tensor, dim: int, inner: int, rotation: Tensor) -> Tensor:
    if rotation.dim() == 2:
        return rotate(x, rotation.T, dim, inner)
    order = _hadamard.largest_order(len(rotation))
    signs = rotation.repeat_interleave(inner).repeat(x.shape[dim] // (len(rotation) * inner))
    return _hadamard_back(x, dim, order, inner) * along_axis(signs, x, dim)


def _hadamard_back(x: Tensor, dim: int, order: int, inner: int) -> Tensor:
    """Times the transpose, by its Kronecker factors."""
    factors = [m.T.to(x) / len(m) ** 0.5 for m in _hadamard.factors(order)]
    return _hadamard.multiply(x, factors, dim, inner)


# Words.


def _hadamard_words(words: Words, node: Call) -> str:
    order, width = node.args[1], words.size(node.args[0])
    return f"hadamard {order}" + (f" of {width}" if width not in (order, None) else "")


def _kronecker_words(words: Words, node: Call) -> str:
    sizes = " x ".join(str(words.size(factor)) for factor in argument(node, "factors"))
    return f"kronecker {sizes} of {words.size(node.args[0])}"


def _along_rows(node: Call) -> list[fx.Node]:
    """A transform of the last axis; of a matrix that is each row for itself."""
    return [node.args[0]] if argument(node, "dim") in (1, -1) else []


_KNOWN: dict[str, Any] = {
    "result": lambda x, *_: x,
    "positions": along("dim", "a transform"),
    "by_row": _along_rows,
    "shown": 2,  # which axis it turns says little
    "traits": Trait.INSERTED,
}
OPERATORS = (
    Operator(
        "rolora::hadamard",
        "(Tensor x, int order, int dim=-1, int inner=1) -> Tensor",
        hadamard,
        basis=_transform,
        axis_map=AxisMap(
            _read_hadamard,
            "hadamard",
            forth=lambda x, dim, n, t: _hadamard.transform(x, n[0], dim, n[1]),
            back=lambda x, dim, n, t: _hadamard_back(x, dim, n[0], n[1]),
            transpose=lambda x, dim, n, t: _hadamard_back(x, dim, n[0], n[1]),
        ),
        words=_hadamard_words,
        **_KNOWN,
    ),
    Operator(
        "rolora::kronecker",
        "(Tensor x, Tensor[] factors, int dim=-1) -> Tensor",
        kronecker,
        basis=_transform,
        axis_map=AxisMap(
            _read_kronecker,
            "kronecker",
            forth=lambda x, dim, n, t: _hadamard.multiply(x, t, dim),
            back=lambda x, dim, n, t: _hadamard.multiply(x, [m.T for m in t], dim),
            transpose=lambda x, dim, n, t: _hadamard.multiply(x, [m.T for m in t], dim),
        ),
        words=_kronecker_words,
        **_KNOWN,
    ),
    Operator(
        "rolora::rotate",
        "(Tensor x, Tensor rotation, int dim=-1, int inner=1) -> Tensor",
        rotate,
        axis_map=AxisMap(
            _read_rotate,
            "rotate",
            forth=lambda x, dim, n, t: rotate(x, t[0], dim, n[0]),
            back=lambda x, dim, n, t: _turned_back(x, dim, n[0], t[0]),
            transpose=lambda x, dim, n, t: _turned_back(x, dim, n[0], t[0]),
        ),
        **_KNOWN,
    ),
)
