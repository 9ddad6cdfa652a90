"""Operators that see the same elements in other axes: reshapes, transpositions, expansions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.graphs.bases.variables import Axis, resolve, take
from rolora_passes.graphs.inputs import SEQUENCE
from rolora_passes.graphs.nodes import argument
from rolora_passes.graphs.operators.places import Mixes, Place, Places, filled
from rolora_passes.graphs.operators.record import Call, Operator, Scope, Trait, alike
from rolora_passes.graphs.operators.steps import AxisMap, Step, WeightReader

# Bases.


def _reshape(s: Scope, node: Call) -> Any:
    """view, flatten, unflatten: deal the factors out again, splitting where an axis ends inside one."""
    if any(isinstance(a, torch.dtype) for a in node.args):
        return None  # reinterprets bits
    rest = [factor for axis in s.of(node.args[0]) for factor in axis]
    out: list[Axis] = []
    for size in s.shape(node) or ():
        cut = take(rest, size)
        if cut is None:
            return None
        out.append(cut[0])
        rest = cut[1]
    return out


def _expand(s: Scope, node: Call) -> Any:
    x, before, after = s.of(node.args[0]), s.shape(node.args[0]), s.shape(node)
    assert before is not None and after is not None
    pad = len(after) - len(before)
    return [
        x[dim - pad]
        if dim >= pad and before[dim - pad] == size
        else s.fresh(size, node, "repeats one value along the axis")
        for dim, size in enumerate(after)
    ]


def _unsqueeze(s: Scope, node: Call) -> Any:
    x = list(s.of(node.args[0]))
    dim = int(node.args[1])
    x.insert(dim % (len(x) + 1), [])
    return x


def _squeeze(s: Scope, node: Call) -> Any:
    dims = node.args[1] if len(node.args) > 1 else None
    x = s.of(node.args[0])
    if dims is None:
        return None
    chosen = {d % len(x) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return [axis for dim, axis in enumerate(x) if dim not in chosen or resolve(axis)]


def _transpose(s: Scope, node: Call) -> Any:
    x = list(s.of(node.args[0]))
    first, second = (node.args[1:3]) if len(node.args) > 1 else (0, 1)
    if len(x) > 1:
        x[first], x[second] = x[second], x[first]
    return x


def _permute(s: Scope, node: Call) -> Any:
    x = s.of(node.args[0])
    return [x[d] for d in node.args[1]]


# Positions.


def _reshaped(i: Places, node: fx.Node) -> Place | None:
    """The elements behind a position, and the rows before it, stay as many."""
    place = i.place(node.args[0])
    if place is None:
        return None
    old, new = i.shape(node.args[0]), i.shape(node)
    behind = place.inner * math.prod(old[place.dim + 1 :])
    before = place.outer * math.prod(old[: place.dim])
    for dim, size in enumerate(new):
        inner, rest = divmod(behind, math.prod(new[dim + 1 :]))
        outer, left = divmod(before, math.prod(new[:dim]))
        if inner and outer and not rest and not left and size == outer * SEQUENCE * inner:
            return Place(dim, outer, inner, place.counts)
    raise Mixes("it reshapes the sequence")


def _expanded(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    if place is None:
        return filled(i, node)
    return Place(place.dim + i.rank(node) - i.rank(node.args[0]), place.outer, place.inner, place.counts)


def _permuted(order: Callable[[Any, int], list[int]]) -> Callable[[Places, fx.Node], Place | None]:
    """`order`: the operand's axes in the order of the result's, given a node and their number."""

    def rule(i: Places, node: fx.Node) -> Place | None:
        place = i.place(node.args[0])
        if place is None:
            return None
        return Place(order(node, i.rank(node)).index(place.dim), place.outer, place.inner, place.counts)

    return rule


def _two_swapped(node: Call, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = (int(node.args[n]) % rank for n in (1, 2))
    order[a], order[b] = b, a
    return order


# What they do to a weight.


def _turn(reader: WeightReader, node: Call) -> list[Step]:
    reader.sides.reverse()
    return []


def _split_axis(reader: WeightReader, node: Call) -> list[Step]:
    dim = argument(node, "dim", -1) % len(reader.shape(node.args[0]))
    sizes = reader.shape(node)[dim : dim + len(node.args[2])]
    step = reader.step(dim, "unflatten", sizes)
    del reader.sides[dim + 1 : dim + len(sizes)]
    return [step]


def _merge_axes(reader: WeightReader, node: Call) -> list[Step]:
    source = reader.shape(node.args[0])
    first, last = (d % len(source) for d in (argument(node, "start_dim", 0), argument(node, "end_dim", -1)))
    reader.sides[first : first + 1] = [reader.sides[first]] * (last - first + 1)
    return [reader.step(first, "flatten", source[first : last + 1])]


def _apart(x: Tensor, dim: int, numbers: tuple[int, ...], _: list[Tensor]) -> Tensor:
    split: Tensor = x.unflatten(dim, numbers)
    return split


def _together(x: Tensor, dim: int, numbers: tuple[int, ...], _: list[Tensor]) -> Tensor:
    return x.flatten(dim, dim + len(numbers) - 1)


_VIEW = Trait.VIEW
_ON_LOGITS = Trait.VIEW | Trait.ON_LOGITS
_TURN = AxisMap(_turn)
_SWAP: dict[str, Any] = {"basis": _transpose, "positions": _permuted(_two_swapped)}

OPERATORS = (
    *alike("view reshape", basis=_reshape, positions=_reshaped, traits=_ON_LOGITS),
    Operator("aten::_unsafe_view", basis=_reshape, positions=_reshaped),
    Operator("aten::_reshape_copy", positions=_reshaped),
    Operator(
        "aten::flatten",
        basis=_reshape,
        axis_map=AxisMap(_merge_axes, "flatten", forth=_together, back=_apart),
        positions=_reshaped,
        traits=_ON_LOGITS,
    ),
    Operator(
        "aten::unflatten",
        basis=_reshape,
        axis_map=AxisMap(_split_axis, "unflatten", forth=_apart, back=_together),
        positions=_reshaped,
        traits=_VIEW | Trait.ON_SCORES,
    ),
    Operator("aten::unsqueeze", basis=_unsqueeze, positions=_reshaped, traits=_ON_LOGITS),
    Operator("aten::squeeze", basis=_squeeze, positions=_reshaped, traits=_ON_LOGITS),
    Operator("aten::transpose", **_SWAP, axis_map=_TURN, traits=_VIEW | Trait.ON_SCORES),
    Operator("aten::swapaxes", **_SWAP),
    Operator(
        "aten::t",
        basis=_transpose,
        axis_map=_TURN,
        positions=_permuted(lambda node, rank: list(range(rank))[::-1]),
    ),
    Operator(
        "aten::permute",
        basis=_permute,
        positions=_permuted(lambda node, rank: [d % rank for d in argument(node, "dims")]),
        traits=_VIEW,
    ),
    Operator("aten::expand", basis=_expand, positions=_expanded, traits=_VIEW),
    *alike("expand_as broadcast_to", positions=_expanded),
)
