"""Where positions run in the values of a graph, and the rules that many operators share.

A rule is given the places of positions in what an operator reads, and says where they run in its result; or
it raises `Mixes`, with how the operator mixes positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from rolora_passes.graphs.inputs import BATCH, SEQUENCE
from rolora_passes.graphs.nodes import argument


@dataclass(frozen=True)
class Place:
    """Where positions run in a value: axis `dim`, read as (outer, S, inner), row-major.

    `counts`: its elements are the numbers 0, 1, 2, .. of the (outer, S) rows, to pick rows of another
    value by.
    """

    dim: int
    outer: int
    inner: int
    counts: bool = False


class Mixes(Exception):
    """An operator mixes positions, or may; never leaves `decoding.state`."""


class Places:
    """Shapes of a graph's values (meta tensors; numbers for sizes), and where positions run in them.

    A value without a place is the same at every position.
    """

    def __init__(self, values: Mapping[fx.Node, Any]) -> None:
        self.values = values
        self.places: dict[fx.Node, Place | None] = {}

    def place(self, item: object) -> Place | None:
        return self.places.get(item) if isinstance(item, fx.Node) else None

    def shape(self, item: Any) -> tuple[int, ...]:
        value = self.values.get(item)
        if not isinstance(value, Tensor):
            raise Mixes("its shape is not known")
        return tuple(value.shape)

    def rank(self, item: Any) -> int:
        return len(self.shape(item))

    def dim(self, node: fx.Node, name: str, of: Any = None) -> list[int]:
        """Axes of an operand that an argument names, from 0 on; all of them, if it names none."""
        rank, given = self.rank(node.args[0] if of is None else of), argument(node, name)
        if given is None or given == []:
            return list(range(rank))
        return [d % max(rank, 1) for d in (given if isinstance(given, list | tuple) else [given])]


def away_from(place: Place | None, dims: Sequence[int], what: str) -> None:
    """Refuse an operator that does something along axes, where positions run along one of them."""
    if place is not None and place.dim in dims:
        raise Mixes(f"{what} along the sequence")


def plain(place: Place | None) -> None:
    """Refuse numbers that count positions as an operand to compute with."""
    if place is not None and place.counts:
        raise Mixes("it counts positions by itself, not from the positions that it is given")


def pointwise(i: Places, node: fx.Node) -> Place | None:
    """Operands broadcast; those by position have it in one place."""
    rank, found = i.rank(node), set[Place]()
    for item in node.all_input_nodes:
        if not isinstance(i.values.get(item), Tensor):
            raise Mixes("it computes with the number of tokens of a call")
        place = i.place(item)
        plain(place)
        if place is not None:
            found.add(Place(place.dim + rank - i.rank(item), place.outer, place.inner))
    if len(found) > 1:
        raise Mixes("its operands have positions along different axes")
    return next(iter(found), None)


def unmoved(i: Places, node: fx.Node) -> Place | None:
    """Another form of one operand; shape and place are its own."""
    return i.place(node.args[0])


def along(name: str, what: str) -> Callable[[Places, fx.Node], Place | None]:
    """Works along axes that an argument names, and keeps the shape, or puts another size there."""

    def rule(i: Places, node: fx.Node) -> Place | None:
        _same_place(i, node)
        place = i.place(node.args[0])
        plain(place)
        away_from(place, i.dim(node, name), what)
        return place

    return rule


def _same_place(i: Places, node: fx.Node) -> None:
    """What else an operator reads by position (an index, a source) is where its subject is."""
    places = {p for n in node.all_input_nodes if (p := i.place(n)) is not None}
    if len(places) > 1 or (places and i.place(node.args[0]) is None):
        raise Mixes("its operands have positions along different axes")


def filled(i: Places, node: fx.Node) -> Place | None:
    """One number, or one slice, everywhere: the same at all positions."""
    for dim, size in enumerate(i.shape(node)):
        if size in (SEQUENCE, BATCH * SEQUENCE):
            return Place(dim, size // SEQUENCE, 1)
        if size % SEQUENCE == 0:
            raise Mixes("its shape says not how positions run")
    return None
