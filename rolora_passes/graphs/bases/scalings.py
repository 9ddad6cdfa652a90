"""Positive scalings: the symmetry that basis classes keep where products hold every rotation.

A basis class that admits invertible matrices admits diagonal ones, x -> x/s. A product y = a·b element by
element admits no other matrix but these, and in them it is a homomorphism: y scales by what a and b scale
by, multiplied. So do relu and its like (y by what x scales by), and the gain and bias of a norm (y by what
both scale by). Inference is run with such nodes cut (`infer_bases`): the class on their far side stands
for itself, and what is left is one equation for every node, over whole powers of s:

    power(y) = power(a) + power(b)        every other class: power 0

A value that linears read is given power -1. Powers then go against the flow, into one operand of every
product, until all equations hold: `Scaling` lists the parameter axes to divide and to multiply by s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from rolora_passes.graphs.bases.inference import BasisClass, Group, ParameterAxis, describe, infer_bases
from rolora_passes.graphs.evaluate import evaluate
from rolora_passes.graphs.expressions import Expressions
from rolora_passes.graphs.graph import aten, constants, insert_after, is_op, linears, root_names
from rolora_passes.graphs.operators import operator_of
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.numerics.exact import exact

_TINY = torch.finfo(torch.float64).tiny

# The power of s that a class's written axes are multiplied by; 0 where it is not listed.
_Powers = dict[BasisClass, int]


@dataclass(frozen=True)
class Reading:
    """Where a class stands on the last axis of a value: the axis is (outer, size, inner), row-major."""

    value: fx.Node
    outer: int
    inner: int


@dataclass(frozen=True, eq=False)
class Scaling:
    """A positive scaling x/s of what linears read, or why there is none.

    Attributes:
        size: the length n of s.
        linears: the linears that read x.
        inputs: the values x they read, with the factor of the last axis that s belongs to.
        weights: the parameter axes that read x.
        divide, multiply: the parameter axes to divide and to multiply by s; the function is then kept.
        moved: names of the values that are scaled with x.
        reason: in words, the operator that blocks the scaling; None if there is one.
    """

    size: int
    linears: tuple[fx.Node, ...]
    inputs: tuple[Reading, ...]
    weights: tuple[ParameterAxis, ...] = ()
    divide: tuple[ParameterAxis, ...] = ()
    multiply: tuple[ParameterAxis, ...] = ()
    moved: frozenset[str] = frozenset()
    reason: str | None = None


def find_scalings(graph: fx.GraphModule) -> list[Scaling]:
    """A Scaling for every class of values that linears read, in graph order, those blocked included.

    The scalings are independent: any of them may be applied, in any order.
    """
    known, symmetry = constants(graph), _Symmetry(graph)
    sites: dict[tuple[BasisClass, bool] | None, list[fx.Node]] = {}
    for linear in linears(graph):
        if linear.args[0] not in known:
            sites.setdefault(symmetry.choose(linear.args[0]), []).append(linear)
    return [_scaling(symmetry, key, tuple(nodes)) for key, nodes in sites.items()]


def apply_scaling(graph: fx.GraphModule, expressions: Expressions, scaling: Scaling, scale: fx.Node) -> None:
    """Write x/s as constant expressions on the parameters of a scaling; `scale` is s [size], positive."""
    shapes = infer_shapes(graph, only=constants(graph))
    for axes, operator in ((scaling.divide, aten.div.Tensor), (scaling.multiply, aten.mul.Tensor)):
        for axis in axes:
            along = _along(graph, scale, axis, shapes[axis.node].dim())
            expressions.wrap(axis.node, operator, along)


def largest(graph: fx.GraphModule, axis: ParameterAxis) -> Tensor:
    """The greatest magnitude along everything but a parameter's axis: float64 [size]."""
    return _by_channel(graph, axis).abs().amax((0, 2, 3))


def energy(graph: fx.GraphModule, axis: ParameterAxis) -> Tensor:
    """The sum of squares along everything but a parameter's axis: float64 [size]."""
    return _by_channel(graph, axis).square().sum((0, 2, 3))


def _by_channel(graph: fx.GraphModule, axis: ParameterAxis) -> Tensor:
    """A parameter as [outer, size, inner, everything else]."""
    value = evaluate(graph, [axis.node])[0].movedim(axis.dim, 0)
    return value.reshape(axis.outer, axis.size, axis.inner, -1)


def relative_energies(value: Tensor) -> Tensor:
    """x_j² / ‖x‖² of every channel j of a value, summed over its tokens: float64 [channels].

    Every token counts alike, as it does where each is rounded on a scale of its own; the few that are a
    thousand times larger than the others would be all that is seen of x_j² itself.
    """
    rows = exact(value.reshape(-1, value.shape[-1])).square()
    return (rows / rows.sum(-1, keepdim=True).clamp_min(_TINY)).sum(0)


def _along(graph: fx.GraphModule, scale: fx.Node, axis: ParameterAxis, rank: int) -> fx.Node:
    """s [size], repeated over the other factors of the axis, shaped to broadcast over the parameter."""
    if axis.outer * axis.inner == 1 and axis.dim == rank - 1:
        return scale
    sizes = [axis.outer, axis.size, axis.inner]
    column = insert_after(graph, scale, aten.reshape.default, scale, [1, axis.size, 1])
    wide = insert_after(graph, column, aten.expand.default, column, sizes)
    shape = [axis.outer * axis.size * axis.inner if d == axis.dim else 1 for d in range(rank)]
    return insert_after(graph, wide, aten.reshape.default, wide, shape)


def _scaling(symmetry: _Symmetry, key: tuple[BasisClass, bool] | None, nodes: tuple[fx.Node, ...]) -> Scaling:
    if key is None:
        return Scaling(1, nodes, (), reason="what they read has one channel, or no known shape")
    cls, flipped = key
    values = dict.fromkeys(cast(fx.Node, n.args[0]) for n in nodes)
    inputs = tuple(symmetry.reading(value, cls) for value in values)
    powers = symmetry.solve(cls, flipped)
    if isinstance(powers, str):
        tables = [root_names(n.args[1])[0] for n in nodes if _is_table(n.args[1])]
        tied = f"{tables[0]} is also an embedding's table, and " if tables else ""
        return Scaling(cls.size, nodes, inputs, reason=tied + powers)
    divide: list[ParameterAxis] = []
    multiply: list[ParameterAxis] = []
    for scaled, power in powers.items():
        for axis in scaled.parameters:
            (divide if (power < 0) != axis.flipped else multiply).append(axis)
    weights = tuple(a for a in cls.parameters if a.flipped != flipped)
    moved = frozenset(node.name for scaled in powers for node, _ in scaled.values)
    return Scaling(cls.size, nodes, inputs, weights, tuple(divide), tuple(multiply), moved)


def _is_table(weight: Any) -> bool:
    return any(is_op(u, "embedding") for u in weight.users)


class _Symmetry:
    """The equations of a graph, and their solutions."""

    def __init__(self, graph: fx.GraphModule) -> None:
        known, shapes = constants(graph), infer_shapes(graph)
        self.equations = [
            (node, terms)
            for node in graph.graph.nodes
            if node not in known
            for terms in sorted(_equations(node, shapes), key=len)
        ]
        cut = dict.fromkeys(node for node, _ in self.equations)
        self.known, self.bases = known, infer_bases(graph, cut)
        terms: dict[fx.Node, set[fx.Node]] = {}
        for node, values in self.equations:
            terms.setdefault(node, set()).update(values)
        self.held = {c: node for node in cut for c in self._beside(node, terms[node], shapes)}
        self._solved: dict[tuple[BasisClass, bool], _Powers | str] = {}

    def choose(self, value: Any) -> tuple[BasisClass, bool] | None:
        """The factor of a value's last axis that can be scaled, or the innermost if none can."""
        factors = self.bases.of(value)
        admitting = [f for f in factors if not isinstance(self.solve(*f), str)]
        return (admitting or factors)[-1] if factors else None

    def reading(self, value: fx.Node, cls: BasisClass) -> Reading:
        sizes = [c.size for c, _ in self.bases.of(value)]
        place = [c for c, _ in self.bases.of(value)].index(cls)
        outer, inner = (int(torch.Size(part).numel()) for part in (sizes[:place], sizes[place + 1 :]))
        return Reading(value, outer, inner)

    def solve(self, cls: BasisClass, flipped: bool) -> _Powers | str:
        """Powers that divide by s what is written (or read, if flipped) in a class; or why there are none."""
        key = cls, flipped
        if key not in self._solved:
            self._solved[key] = self._blocked(cls) or self._settle({cls: 1 if flipped else -1})
        return self._solved[key]

    def _beside(self, node: fx.Node, terms: set[fx.Node], shapes: dict[fx.Node, Any]) -> Iterator[BasisClass]:
        """Classes that cutting a node leaves unconstrained: other axes than the last, and the last of what is
        no term of its equations (what is normed)."""
        for operand in (node, *node.all_input_nodes):
            for dim in range(shapes[operand].dim() - 1):
                yield from (c for c, _ in self.bases.of(operand, dim))
        for operand in {*node.all_input_nodes} - terms:
            yield from (c for c, _ in self.bases.of(operand))

    def _blocked(self, cls: BasisClass) -> str | None:
        if cls.group < Group.INVERTIBLE:
            return cls.why_rigid()
        if cls in self.held:
            return f"{describe(self.held[cls])} has the axis beside the one it scales"
        return None

    def _settle(self, powers: _Powers) -> _Powers | str:
        """Powers, more of them if need be, that satisfy every equation."""
        for node, terms in self.equations:
            wanted, found = self._power(node, powers), [self._power(t, powers) for t in terms]
            if wanted is None or None in found:
                return f"{describe(node)} takes the axis apart into factors"
            missing = wanted - sum(cast(list[int], found))
            if not missing:
                continue
            if not wanted:
                return f"{describe(node)} reads it too"
            return self._absorb(node, terms, missing, powers)
        return powers

    def _absorb(
        self, node: fx.Node, terms: tuple[fx.Node, ...], missing: int, powers: _Powers
    ) -> _Powers | str:
        """Let one operand of a product, a parameter if there is one, take what is missing."""
        reasons: dict[str, None] = {}
        for term in sorted(terms, key=lambda t: t not in self.known):
            settled = self._take(node, term, missing, powers)
            if not isinstance(settled, str):
                return settled
            reasons[settled] = None
        return "; ".join(reasons)

    def _take(self, node: fx.Node, term: fx.Node, missing: int, powers: _Powers) -> _Powers | str:
        factors = self.bases.of(term)
        if len(factors) != 1:
            return f"{describe(node)} takes the axis apart into factors"
        ((cls, flipped),) = factors
        if cls in powers or abs(missing) > 1:
            return f"{describe(node)} multiplies the axis by itself"
        return self._blocked(cls) or self._settle({**powers, cls: -missing if flipped else missing})

    def _power(self, node: fx.Node, powers: _Powers) -> int | None:
        """The power a value's last axis scales by; None where only a factor of it does."""
        factors = self.bases.of(node)
        if len(factors) != 1:
            return None if any(c in powers for c, _ in factors) else 0
        ((cls, flipped),) = factors
        return -powers.get(cls, 0) if flipped else powers.get(cls, 0)


def _equations(node: fx.Node, shapes: dict[fx.Node, Any]) -> list[tuple[fx.Node, ...]]:
    """The values whose scales, multiplied, are the scale of a node's last axis: one tuple an equation."""
    value, known = shapes.get(node), operator_of(node)
    if known is None or known.scaling is None or not isinstance(value, Tensor):
        return []
    result: Tensor = value
    if not result.dim() or result.shape[-1] == 1:
        return []

    def spans(operand: object, whole: bool = False) -> bool:
        other = shapes.get(operand) if isinstance(operand, fx.Node) else None
        if not isinstance(other, Tensor) or not other.is_floating_point() or not other.dim():
            return False
        return other.shape == result.shape if whole else other.shape[-1] == result.shape[-1]

    return known.scaling(node, spans)
