"""Operators that multiply by matrices: linear, matmul, convolutions."""

from __future__ import annotations

from typing import Any

from torch import fx

from rolora_passes.graphs.bases.variables import Axis, Group, limit, unify
from rolora_passes.graphs.nodes import argument, op_name
from rolora_passes.graphs.operators.places import Mixes, Place, Places, away_from, plain
from rolora_passes.graphs.operators.record import Call, Operator, Scope, Trait, Words, alike

# Bases.


def _linear(s: Scope, node: Call) -> Any:
    x, weight = s.of(node.args[0]), s.of(node.args[1])
    if len(weight) != 2:
        return None
    unify(x[-1], weight[1], node, flip=True)
    bias = argument(node, "bias")
    if bias is not None:
        if s.shape(bias) != s.shape(node.args[1])[:1]:
            return None  # one number for all
        unify(weight[0], s.of(bias)[0], node)
    return [*x[:-1], weight[0]]


def _matmul(s: Scope, node: Call) -> Any:
    a, b = s.of(node.args[0]), s.of(node.args[1])
    if len(a) < 2 or len(b) < 2:
        return None
    unify(a[-1], b[-2], node, flip=True)
    batch = s.shape(node)[:-2]
    out: list[Axis] = []
    for place, size in enumerate(batch, start=-len(batch)):
        present = [
            axes[place - 2]
            for axes, value in ((a, node.args[0]), (b, node.args[1]))
            if len(axes) >= 2 - place and s.shape(value)[place - 2] == size
        ]
        for other in present[1:]:
            unify(present[0], other, node)
        if len(present) > 1:
            limit(present[0], Group.PERMUTATION, node, "multiplies matrix by matrix along the axis")
        out.append(present[0])
    return [*out, a[-2], b[-1]]


# Positions.


def _by_row(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    plain(place)
    away_from(place, [i.rank(node.args[0]) - 1], "it multiplies by a matrix")
    if any(i.place(n) for n in node.all_input_nodes if n is not node.args[0]):
        raise Mixes("its weight runs along the sequence")
    return place


def _multiplied(i: Places, node: fx.Node) -> Place | None:
    """A position may be a batch of either operand, a row of the first, or a column of the second."""
    left, right = node.args[-2:] if op_name(node) == "addmm" else node.args[:2]
    places = []
    for side, (item, contracted) in enumerate(((left, -1), (right, -2))):
        place, rank = i.place(item), i.rank(item)
        plain(place)
        if rank < 2 and place is not None:
            raise Mixes("it multiplies along the sequence")
        away_from(place, [rank + contracted], "it multiplies")
        if place is not None:
            free = rank + contracted + (1 if side else -1)
            places.append(
                (Place(place.dim + i.rank(node) - rank, place.outer, place.inner), place.dim == free)
            )
    if len(places) == 2 and (places[0][0] != places[1][0] or places[0][1] or places[1][1]):
        raise Mixes("it multiplies positions by positions, as attention does")
    return places[0][0] if places else None


def _convolved(i: Places, node: fx.Node) -> Place | None:
    """Over flattened tokens, or with a kernel of one position."""
    place, rank = i.place(node.args[0]), i.rank(node.args[0])
    plain(place)
    spatial = rank - i.rank(node.args[1]) + 2
    if place is None or place.dim < spatial - 1:
        return place
    still = {"stride": 1, "padding": 0, "dilation": 1}
    size = i.shape(node.args[1])[place.dim - rank]
    same = all(set(argument(node, name)) <= {value} for name, value in still.items() if name != "dilation")
    if place.dim >= spatial and size == 1 and same:
        return place
    raise Mixes("a convolution along the sequence, which needs the last inputs as its state")


def _linear_words(words: Words, node: Call) -> str:
    weight = words.weight(node.args[1])
    if weight is None:
        return words.plain(node)
    return weight + (", bias" if argument(node, "bias") is not None else "")


OPERATORS = (
    Operator("aten::linear", basis=_linear, positions=_by_row, words=_linear_words, traits=Trait.ONE_TYPE),
    Operator("aten::matmul", basis=_matmul, positions=_multiplied, sign="@", traits=Trait.ONE_TYPE),
    *alike("mm bmm", basis=_matmul, positions=_multiplied, traits=Trait.ONE_TYPE),
    Operator("aten::addmm", positions=_multiplied, traits=Trait.ONE_TYPE),
    Operator("aten::baddbmm", traits=Trait.ONE_TYPE),
    *alike("conv1d conv2d convolution", positions=_convolved),
)
