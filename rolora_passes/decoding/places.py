"""Where positions run in the values of a graph, as `position_rules` reads and says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from rolora_passes.graphs.graph import argument


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
    """An operator mixes positions, or may; never leaves `state`."""


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
