"""Operators along whole axes: sums, softmax, sorting, running sums."""

from __future__ import annotations

from typing import Any

from rolora_passes.graphs.bases.variables import Group, limit
from rolora_passes.graphs.nodes import argument
from rolora_passes.graphs.operators.elementwise import nonlinear
from rolora_passes.graphs.operators.places import Place, Places, along, away_from, plain, pointwise
from rolora_passes.graphs.operators.record import Call, Operator, Scope, Trait, alike


def _reduce(s: Scope, node: Call) -> Any:
    """sum, mean: linear, but not invariant along what they reduce."""
    x, dims = s.of(node.args[0]), argument(node, "dim")
    if dims is None or dims == []:
        dims = range(len(x))
    chosen = {d % len(x) for d in (dims if hasattr(dims, "__iter__") else [dims])}
    for dim in chosen:
        limit(x[dim], Group.PERMUTATION, node, "adds up along the axis")
    if argument(node, "keepdim"):
        return [[] if dim in chosen else axis for dim, axis in enumerate(x)]
    return [axis for dim, axis in enumerate(x) if dim not in chosen]


def _reduced(i: Places, node: Call) -> Place | None:
    if node.target._overloadname == "other":  # of two operands: min, max
        return pointwise(i, node)
    place, dims = i.place(node.args[0]), i.dim(node, "dim")
    plain(place)
    away_from(place, dims, "it reduces")
    if place is None or argument(node, "keepdim", False):
        return place
    return Place(place.dim - sum(d < place.dim for d in dims), place.outer, place.inner)


_SOFTMAX: dict[str, Any] = {"basis": nonlinear, "positions": along("dim", "a softmax")}

OPERATORS = (
    Operator("aten::sum", basis=_reduce, positions=_reduced, traits=Trait.ON_SCORES),
    Operator("aten::mean", basis=_reduce, positions=_reduced),
    *alike("max argmax argmin", positions=_reduced, traits=Trait.CHOOSES),
    *alike("amax amin min prod any all logsumexp var std norm count_nonzero", positions=_reduced),
    *alike("softmax log_softmax", **_SOFTMAX, traits=Trait.ON_LOGITS),
    Operator("aten::_softmax", **_SOFTMAX),
    *alike("cumsum cumprod", positions=along("dim", "a running sum or product")),
    *alike("topk sort argsort", positions=along("dim", "it sorts"), traits=Trait.CHOOSES),
    *alike("multinomial kthvalue", traits=Trait.CHOOSES),
    Operator("aten::flip", positions=along("dims", "it reverses")),
    Operator("aten::roll", positions=along("dims", "it shifts")),
    Operator("aten::glu", positions=along("dim", "it splits")),
)
