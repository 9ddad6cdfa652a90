"""Basis classes: axes that must share one change of basis, and where it is contracted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rolora_passes.graphs.bases.variables import Group, Variable, resolve
from rolora_passes.graphs.graph import constants, op_name, root_names


@dataclass(frozen=True)
class ParameterAxis:
    """One factor of one axis of a parameter (or of a constant expression).

    The axis is read as (outer, size, inner), row-major, and the class's matrix acts on the middle.
    """

    node: fx.Node
    dim: int
    outer: int
    size: int
    inner: int
    flipped: bool

    @property
    def parameter(self) -> str:
        return root_names(self.node)[0]

    def __str__(self) -> str:
        sizes = [str(s) for s in (self.outer, self.size, self.inner)]
        factor = "" if self.outer == self.inner == 1 else f" as {'x'.join(s for s in sizes if s != '1')}"
        return f"{self.parameter} axis {self.dim}{factor}"


@dataclass(frozen=True, eq=False)
class BasisClass:
    """Axes that must share one change of basis.

    Attributes:
        size: the order n of its matrix.
        group: the matrices it admits.
        parameters: where such a matrix is contracted.
        values: the activations, as (node, dim), that come out in the new basis.
        reasons: for each operator that narrowed the group to what it is: (node, why).
        roles: what operators called the axis: "embedding", "value", "query", "norm".
        index: its place among the classes of its kind, in graph order.
    """

    size: int
    group: Group
    parameters: list[ParameterAxis]
    values: list[tuple[fx.Node, int]]
    reasons: list[tuple[fx.Node | None, str]]
    roles: frozenset[str]
    index: int = 0

    @property
    def free(self) -> bool:
        """Whether an orthogonal change of basis keeps the function."""
        return self.group >= Group.ORTHOGONAL

    @property
    def kind(self) -> str:
        """`residual`, `head` (between value and output projection), `query-key`, or `inner`."""
        for role, kind in (
            ("value", "head"),
            ("query", "query-key"),
            ("embedding", "residual"),
            ("norm", "residual"),
        ):
            if role in self.roles:
                return kind
        return "inner"

    @property
    def name(self) -> str:
        return self.kind if self.kind == "residual" and not self.index else f"{self.kind}.{self.index}"

    def why_rigid(self) -> str:
        """The operators that block a rotation, in words."""
        blocking = list(dict.fromkeys(self.reasons))
        told = "; ".join(f"{describe(node)} {why}" for node, why in blocking[:3])
        return told + (f"; and {len(blocking) - 3} more" if len(blocking) > 3 else "")


@dataclass
class Bases:
    """The classes of a graph, those that parameters carry, and the class of every axis."""

    classes: list[BasisClass]
    _axes: dict[fx.Node, Any]
    _by_variable: dict[Variable, BasisClass] = field(repr=False)

    def of(self, node: Any, dim: int = -1) -> list[tuple[BasisClass, bool]]:
        """The factors of an axis of a value, outermost first: (class, flipped)."""
        axes = self._axes.get(node)
        if not isinstance(axes, list) or not axes:
            return []
        return [(self._by_variable[v], flipped) for v, flipped in resolve(axes[dim])]

    def rotatable(self) -> list[BasisClass]:
        """Free classes that parameters carry: rotating them costs nothing at run time."""
        return [c for c in self.classes if c.free and c.parameters]


def describe(node: fx.Node | None) -> str:
    """A node, the operator if its name is another, and the parameters it reads: `mul (model.norm.weight)`."""
    if node is None:
        return "the graph"
    known = constants(node.graph.owning_module) if node.graph.owning_module else set()
    roots = [root_names(a)[0] for a in node.all_input_nodes if a in known]
    operator = op_name(node)
    said = re.sub(r"_\d+$", "", node.name) == operator
    return (node.name if said else f"{operator} {node.name}") + (f" ({', '.join(roots)})" if roots else "")
