"""Operators that look rows up by number, or put them in their place."""

from __future__ import annotations

from typing import Any

from torch import fx

from rolora_passes.graphs.bases.variables import Group, limit, tag, unify
from rolora_passes.graphs.nodes import argument
from rolora_passes.graphs.operators.places import Mixes, Place, Places, along, away_from, plain, unmoved
from rolora_passes.graphs.operators.record import Call, Operator, Scope, Trait, Words, alike

# Bases.


def _embedding(s: Scope, node: Call) -> Any:
    rows, columns = s.of(node.args[0])
    limit(rows, Group.NONE, node, "looks rows up by number")
    tag(columns, "embedding")
    return [*s.of(node.args[1]), columns]


def _index(s: Scope, node: Call) -> Any:
    """Rows by number: x[:, idx]; the other axes pass."""
    x, positions = list(s.of(node.args[0])), node.args[1]
    chosen = [(i, n) for i, n in enumerate(positions) if n is not None]
    if len(chosen) != 1:
        return None
    dim, index = chosen[0]
    limit(x[dim], Group.NONE, node, "looks rows up by number")
    return [*x[:dim], *s.of(index), *x[dim + 1 :]]


def _index_select(s: Scope, node: Call) -> Any:
    x, dim = list(s.of(node.args[0])), int(node.args[1])
    limit(x[dim], Group.NONE, node, "looks rows up by number")
    x[dim] = s.of(node.args[2])[0]
    return x


def _index_put(s: Scope, node: Call) -> Any:
    """Rows replaced by number (a merge of modalities): what is left of both must share bases."""
    x, positions, values = s.of(node.args[0]), node.args[1], s.of(node.args[2])
    if any(p is None for p in positions) or len(node.args) > 3:
        return None
    count = sum(len(s.of(p)) if s.masks(p) else 1 for p in positions)
    rows, rest = x[:count], x[count:]
    for axis in (*rows, *values[: len(values) - len(rest)]):
        limit(axis, Group.NONE, node, "replaces rows by number")
    if s.shape(node.args[2])[len(values) - len(rest) :] != s.shape(node)[len(rows) :]:
        return None
    for axis, other in zip(rest, values[len(values) - len(rest) :], strict=True):
        unify(axis, other, node)
    return list(x)


# Positions.


def _indexed(i: Places, node: Call) -> Place | None:
    """Rows of a table by position; or rows of a value by an index that counts them."""
    x, given = node.args[0], node.args[1]
    picked = [(d, n) for d, n in enumerate(given) if n is not None]
    if len(picked) != 1:
        raise Mixes("it looks up by several indices")
    dim, index = picked[0]
    return _look_up(i, x, index, dim)


def _selected(i: Places, node: fx.Node) -> Place | None:
    (dim,) = i.dim(node, "dim")
    return _look_up(i, node.args[0], argument(node, "index"), dim)


def _look_up(i: Places, x: Any, index: fx.Node, dim: int) -> Place | None:
    place, by = i.place(x), i.place(index)
    if place is None:
        plain(by)
        return None if by is None else Place(by.dim + dim, by.outer, by.inner)
    if by is None:
        away_from(place, [dim], "it picks positions")
        return Place(place.dim + (i.rank(index) - 1 if dim < place.dim else 0), place.outer, place.inner)
    if by.counts and place.dim == dim and place.inner == 1 and place.outer == by.outer:
        return Place(by.dim + dim, by.outer, by.inner)
    raise Mixes("it picks positions by an index")


def _gathered(i: Places, node: fx.Node) -> Place | None:
    """Of what is the same at all positions, each element of an index takes its own."""
    index = i.place(argument(node, "index"))
    if i.place(node.args[0]) is None:
        plain(index)
        return index
    return along("dim", "it gathers")(i, node)


def _embedded(i: Places, node: fx.Node) -> Place | None:
    if i.place(node.args[0]) is not None:
        raise Mixes("its table runs along the sequence")
    by = i.place(node.args[1])
    plain(by)
    return by


def _embedding_words(words: Words, node: Call) -> str:
    table = words.weight(node.args[0])
    return words.plain(node) if table is None else f"embedding {table}"


OPERATORS = (
    Operator("aten::embedding", basis=_embedding, positions=_embedded, words=_embedding_words),
    Operator("aten::index", basis=_index, positions=_indexed),
    Operator("aten::index_select", basis=_index_select, positions=_selected),
    Operator("aten::index_put", basis=_index_put),
    Operator("aten::gather", positions=_gathered),
    Operator("aten::one_hot", positions=unmoved, traits=Trait.CHOOSES),
    *alike("scatter scatter_add scatter_reduce", positions=along("dim", "it scatters")),
)
