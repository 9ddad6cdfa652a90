"""How an operator maps one axis of a weight: read off the graph, and done to another tensor, or undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, fx


@dataclass(frozen=True)
class Step:
    """A map of one axis of a weight.

    Attributes:
        kind: what did it, `AxisMap.kind`: "mul", "rotate", "slice", …, or "shift": the linear's input has had
            `tensors[0]` added, which its bias holds since; "changed": a matrix was added to the weight.
        side: "in" or "out".
        place: which of the side's axes, for a fused projection may be unflattened.
        numbers: as the kind has them: [inner] of rotate; [order, inner]; [start, end, size] of slice; sizes.
        tensors: names in the graph's `way_tensors` (`name_of`).
    """

    kind: str
    side: str
    place: int = 0
    numbers: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()


CHANGED = Step("changed", "in")


class NoMap(Exception):
    """An operator on a weight that no adapter can be carried over; never leaves `graphs.lineage`."""


class WeightReader(Protocol):
    """What `AxisMap.read` may ask of the walk from a weight back to its parameter.

    Attributes:
        sides: "out" and "in" for the axes of the node's result; a rule makes it those of its operand.
    """

    sides: list[str]

    def shape(self, node: Any) -> list[int]:
        """The sizes of a value."""

    def tensor(self, node: fx.Node) -> str:
        """The name under which the value of an expression is kept, for `Step.tensors`."""

    def step(self, dim: int, kind: str, numbers: Sequence[int] = (), tensors: Sequence[str] = ()) -> Step:
        """A map of the axis `dim` of the weight."""


Apply = Callable[[Tensor, int, tuple[int, ...], list[Tensor]], Tensor]
"""(x, dim, numbers, tensors) -> x with the map done to its axis `dim`."""


@dataclass(frozen=True)
class AxisMap:
    """How an operator maps one axis of a weight, its first operand.

    Attributes:
        read: the steps that a node is. It raises `NoMap` where the node is no map of one axis.
        kind: what `forth` and `back` do, as `Step.kind` says it; "" where `read` gives no step of its own.
        forth: the map done to an axis of another tensor.
        back: the map undone, as a branch beside the weight needs it.
        transpose: the map's transpose, as what the weight is multiplied with needs it: x·(W·M)ᵀ = (x·Mᵀ)·Wᵀ.
            Of an orthogonal map that is `back`, of a diagonal one `forth`.
    """

    read: Callable[[WeightReader, Any], list[Step]]
    kind: str = ""
    forth: Apply | None = None
    back: Apply | None = None
    transpose: Apply | None = None


def still(reader: WeightReader, node: Any) -> list[Step]:
    """Every axis stays as it is."""
    return []
