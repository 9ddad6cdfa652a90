"""Operators that take a value apart, or join several: slices, splits, concatenations, repetitions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from rolora_passes.graphs.bases.variables import Axis, Group, limit, unify
from rolora_passes.graphs.nodes import argument, op_name
from rolora_passes.graphs.operators.places import Mixes, Place, Places, away_from, filled, plain, unmoved
from rolora_passes.graphs.operators.record import Call, Operator, Scope, Trait, alike, every_operand
from rolora_passes.graphs.operators.steps import AxisMap, NoMap, Step, WeightReader

# Bases.


def _slice(s: Scope, node: Call) -> Any:
    dim = int(node.args[1]) if len(node.args) > 1 else 0
    return _part(s, node, dim, s.shape(node))


def _part(s: Scope, node: Call, dim: int, shape: tuple[int, ...] | None) -> list[Axis]:
    """A range of one axis: that axis is pinned, unless the range is all of it."""
    x = list(s.of(node.args[0]))
    assert shape is not None
    before = s.shape(node.args[0])
    if before is not None and before[dim] != shape[dim]:
        limit(x[dim], Group.NONE, node, "takes the axis apart")
        x[dim] = s.fresh(shape[dim], node, "is a part of an axis")
    return x


def _split(s: Scope, node: Call) -> Any:
    dim = argument(node, "dim")
    return tuple(_part(s, node, dim, shape) for shape in s.shapes_of_parts(node))


def _getitem(s: Scope, node: Call) -> Any:
    parts = s.parts(node.args[0])
    return parts[node.args[1]] if parts else None


def _select(s: Scope, node: Call) -> Any:
    x = list(s.of(node.args[0]))
    limit(x.pop(int(node.args[1])), Group.NONE, node, "takes one element of the axis")
    return x


def _concatenate(s: Scope, node: Call) -> Any:
    parts = [s.of(part) for part in node.args[0]]
    dim = int(node.args[1]) if len(node.args) > 1 else 0
    stacked = op_name(node) == "stack"
    out = []
    for place in range(len(parts[0])):
        for other in parts[1:]:
            if stacked or place != dim % len(parts[0]):
                unify(parts[0][place], other[place], node)
        out.append(parts[0][place])
    shape = s.shape(node) or ()
    joined = s.fresh(shape[dim], node, "joins parts along the axis")
    if stacked:
        return [*out[: dim % len(shape)], joined, *out[dim % len(shape) :]]
    for part in parts:
        limit(part[dim], Group.NONE, node, "joins parts along the axis")
    out[dim] = joined
    return out


def _repeat_interleave(s: Scope, node: Call) -> Any:
    count, dim = node.args[1], argument(node, "dim")
    if not isinstance(count, int) or dim is None:
        return None
    x = list(s.of(node.args[0]))
    x[dim] = [*x[dim], *s.fresh(count, node, "repeats one value along the axis")]
    return x


# Positions.


def _sliced(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    if place is not None and i.shape(node)[place.dim] != i.shape(node.args[0])[place.dim]:
        raise Mixes("it takes a part of the sequence")
    return place


def _selected(i: Places, node: fx.Node) -> Place | None:
    place, (dim,) = i.place(node.args[0]), i.dim(node, "dim")
    away_from(place, [dim], "it takes one element")
    return (
        None
        if place is None
        else Place(place.dim - (dim < place.dim), place.outer, place.inner, place.counts)
    )


def _padded(i: Places, node: fx.Node) -> Place | None:
    place, widths = i.place(node.args[0]), list(argument(node, "pad"))
    rank = i.rank(node.args[0])
    plain(place)
    away_from(place, [rank - 1 - k // 2 for k, width in enumerate(widths) if width != 0], "it pads")
    return place


def _joined(i: Places, node: Call) -> Place | None:
    parts = [n for n in node.args[0] if isinstance(n, fx.Node)]
    places = {i.place(part) for part in parts}
    place = next((p for p in places if p is not None), None)
    if place is None:
        return filled(i, node)
    if len(places) > 1:
        raise Mixes("it joins values that run along the sequence to others")
    rank = i.rank(parts[0])
    plain(place)
    if op_name(node) == "stack":
        dim = int(argument(node, "dim")) % (rank + 1)
        return Place(place.dim + (dim <= place.dim), place.outer, place.inner)
    away_from(place, [int(argument(node, "dim")) % rank], "it joins")
    return place


def _repeated(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    if place is None:
        return filled(i, node)
    moved = i.rank(node) - i.rank(node.args[0])
    if i.shape(node)[place.dim + moved] != i.shape(node.args[0])[place.dim]:
        raise Mixes("it repeats along the sequence")
    return Place(place.dim + moved, place.outer, place.inner, place.counts)


def _interleaved(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    if place is None:
        return filled(i, node)
    times = argument(node, "repeats")
    if not isinstance(times, int) or argument(node, "dim") is None:
        raise Mixes("it repeats each position as often as it computes")
    along = [place.dim] == i.dim(node, "dim")
    return Place(place.dim, place.outer, place.inner * times if along else place.inner, place.counts)


def _taken_apart(i: Places, node: fx.Node) -> Place | None:
    """split, chunk, unbind: one place for all parts."""
    place = i.place(node.args[0])
    (dim,) = i.dim(node, "dim")
    away_from(place, [dim], "it splits")
    if place is None or op_name(node) != "unbind":
        return place
    return Place(place.dim - (dim < place.dim), place.outer, place.inner, place.counts)


# What they do to a weight.


def _cut(reader: WeightReader, node: Call) -> list[Step]:
    source = reader.shape(node.args[0])
    dim = argument(node, "dim", 0) % len(source)
    if argument(node, "step", 1) != 1:
        raise NoMap(f"{node.format_node()} takes every other of a weight's channels")
    start, end, _ = slice(argument(node, "start"), argument(node, "end")).indices(source[dim])
    return [reader.step(dim, "slice", (start, end, source[dim]))]


def _embedded(x: Tensor, dim: int, start: int, size: int) -> Tensor:
    """A slice in its place of a whole that is zero elsewhere."""
    shape = list(x.shape)
    shape[dim] = size
    whole = x.new_zeros(shape)
    whole.narrow(dim, start, x.shape[dim]).copy_(x)
    return whole


OPERATORS = (
    Operator(
        "aten::slice",
        basis=_slice,
        axis_map=AxisMap(
            _cut,
            "slice",
            forth=lambda x, dim, n, t: x.narrow(dim, n[0], n[1] - n[0]),
            back=lambda x, dim, n, t: _embedded(x, dim, n[0], n[2]),
            transpose=lambda x, dim, n, t: _embedded(x, dim, n[0], n[2]),
        ),
        positions=_sliced,
        traits=Trait.ON_LOGITS,
    ),
    Operator("aten::narrow", positions=_sliced),
    Operator("aten::select", basis=_select, positions=_selected, traits=Trait.ON_LOGITS),
    *alike("chunk split split_with_sizes", basis=_split, positions=_taken_apart),
    Operator("aten::unbind", positions=_taken_apart),
    Operator(
        "operator.getitem", basis=_getitem, positions=unmoved, by_row=every_operand, traits=Trait.ON_SCORES
    ),
    *alike("cat stack", basis=_concatenate, positions=_joined),
    Operator("aten::concat", positions=_joined),
    Operator("aten::repeat_interleave", basis=_repeat_interleave, positions=_interleaved),
    *alike("repeat tile", positions=_repeated),
    *alike("pad constant_pad_nd", positions=_padded),
)
