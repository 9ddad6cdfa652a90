"""Operators that make values of nothing, or of a shape alone."""

from __future__ import annotations

from torch import fx

from rolora_passes.graphs.operators.places import Mixes, Place, Places, filled
from rolora_passes.graphs.operators.record import Operator, Trait, alike


def _count(i: Places, node: fx.Node) -> Place | None:
    """arange over rows (tokens of a batch), which picks each row itself; of anything else it is a count."""
    place = filled(i, node)
    steps = [a for a in node.args if isinstance(a, int | float)]
    if place is not None and any(steps):
        raise Mixes("it counts positions by itself, not from the positions that it is given")
    return None if place is None else Place(place.dim, place.outer, 1, counts=True)


OPERATORS = (
    Operator("aten::arange", positions=_count),
    *alike("zeros ones full new_zeros new_ones new_full scalar_tensor", positions=filled),
    *alike("zeros_like ones_like full_like", positions=filled, traits=Trait.BLIND),
    *alike("empty_like new_empty", positions=filled, traits=Trait.UNWRITTEN | Trait.BLIND),
    Operator("aten::empty", positions=filled, traits=Trait.UNWRITTEN),
    *alike("empty_strided new_empty_strided", traits=Trait.UNWRITTEN),
    *alike("fill zero sym_size", traits=Trait.BLIND),
)
