"""Basis inference: which axes of a graph may rotate together, and what blocks the others.

Every axis of every value is a product of *factors*; each factor has a basis variable. An operator
relates the variables of its operands (`Operator.basis`); unification yields classes of axes that must
share one change of basis. A class admits a `Group` of matrices: the smallest that any operator on it
commutes with. An operator nobody wrote a rule for admits none, so it can cost an opportunity and never
correctness.

Changing the basis of a class is one rule: contract R into every parameter axis of the class. An axis
that reads the value (contracted with it) is *flipped*: it takes the inverse transpose of R, which for an
orthogonal R is R itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.bases.classes import Bases, BasisClass, ParameterAxis, describe
from rolora_passes.graphs.bases.variables import Axis, Group, Variable, limit, product, resolve
from rolora_passes.graphs.graph import constants, leaves, op_name
from rolora_passes.graphs.operators import operator_of
from rolora_passes.graphs.operators.record import Scope
from rolora_passes.graphs.shapes import infer_shapes

__all__ = ["Bases", "BasisClass", "Group", "ParameterAxis", "describe", "infer_bases"]


def infer_bases(graph: fx.GraphModule, cut: Collection[fx.Node] = ()) -> Bases:
    """Infer the basis classes of a graph.

    Args:
        graph: any graph; nothing is assumed of it beyond the meaning of its operators.
        cut: nodes to look past: the last axis of such a value is taken to be independent of its
            operand's, and the operand as unconstrained by it. What a rewrite that would remove the
            node needs to know is the class on either side of it.
    """
    return _Inference(graph, cut).run()


class _Inference:
    """Walks the graph once; the rules call `unify`, `limit` and `fresh` on it."""

    def __init__(self, graph: fx.GraphModule, cut: Collection[fx.Node]) -> None:
        self.graph = graph
        self.cut = set(cut)
        self.shapes = infer_shapes(graph)
        self.axes: dict[fx.Node, Any] = {}
        self.variables: list[Variable] = []

    # What rules use.

    def fresh(self, size: int, node: fx.Node | None = None, why: str = "") -> Axis:
        """A new axis; rigid if a reason is given."""
        if size == 1:
            return []
        variable = Variable(size)
        self.variables.append(variable)
        axis: Axis = [(variable, False)]
        if why:
            limit(axis, Group.NONE, node, why)
        return axis

    def shape(self, node: object) -> Any:
        """The sizes of a value, or None where it is no tensor or its shape is unknown."""
        value = self.shapes.get(node) if isinstance(node, fx.Node) else None
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None

    def of(self, node: Any) -> list[Axis]:
        found = self.axes[node]
        assert isinstance(found, list)
        return found

    def parts(self, node: Any) -> tuple[Any, ...]:
        found = self.axes.get(node)
        return found if isinstance(found, tuple) else ()

    def shapes_of_parts(self, node: Any) -> list[tuple[int, ...]]:
        return [tuple(part.shape) for part in self.shapes[node]]

    def masks(self, node: object) -> bool:
        """Whether a value is true or false."""
        return self.shapes[node].dtype == torch.bool  # type: ignore[index,no-any-return]

    def known(self, node: object) -> bool:
        return isinstance(node, fx.Node) and isinstance(self.axes.get(node), list)

    # The walk.

    def run(self) -> Bases:
        constant, leaf = constants(self.graph), leaves(self.graph)
        for node in self.graph.graph.nodes:
            if node in leaf:
                why = "" if self._floating(node) else "is read as whole numbers"
                self.axes[node] = [self.fresh(size, node, why) for size in self.shape(node) or ()]
            elif node not in constant:
                self.axes[node] = self._visit(node)
        return self._classes(list(leaf))

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._rigid_like(node, "is an input of the graph")
        if node.op == "output":
            self._block(node, "is the graph's output")
            return None
        if node in self.cut and self.shape(node) is not None:
            return self._cut(node)
        rule = self._rule(node)
        if op_name(node) == "sym_size" or not isinstance(self.shapes.get(node), (torch.Tensor, tuple, list)):
            if op_name(node) != "sym_size":
                self._block(node, "has no rule")
            return None
        found = rule(self, node) if rule and all(self._readable(a) for a in node.all_input_nodes) else None
        if found is None or not _fits(found, self.shapes[node]):
            self._block(node, "has no rule" if rule is None else "has no rule for these operands")
            return self._rigid_like(node, "comes out of an operator without a rule")
        return found

    def _rule(self, node: fx.Node) -> Callable[[Scope, Any], Any] | None:
        """The rule for an operator as export writes it: arguments in place."""
        known = operator_of(node)
        if known is None or known.basis is None:
            return None
        if not isinstance(node.target, torch._ops.OpOverload):
            return known.basis
        if any(a.name in node.kwargs and not a.kwarg_only for a in node.target._schema.arguments):
            return None
        rounds = not self._floating(node) and any(self._floating(a) for a in node.all_input_nodes)
        return None if rounds else known.basis

    def _floating(self, node: fx.Node) -> bool:
        value = self.shapes.get(node)
        parts = value if isinstance(value, (tuple, list)) else (value,)
        return all(v.is_floating_point() for v in parts if isinstance(v, torch.Tensor))

    def _readable(self, node: fx.Node) -> bool:
        """Whether a rule may ask for this operand's axes (sizes and tuples have none of their own)."""
        return node in self.axes and (
            self.axes[node] is not None or not isinstance(self.shapes.get(node), torch.Tensor)
        )

    def _cut(self, node: fx.Node) -> Any:
        operand = next(a for a in node.all_input_nodes if self.known(a) and self.shape(a) == self.shape(node))
        return [*self.of(operand)[:-1], self.fresh((self.shape(node) or (1,))[-1])]

    def _block(self, node: fx.Node, why: str) -> None:
        for operand in node.all_input_nodes:
            for axis in _flat(self.axes.get(operand)):
                limit(axis, Group.NONE, node, why)

    def _rigid_like(self, node: fx.Node, why: str) -> Any:
        value = self.shapes.get(node)
        if isinstance(value, torch.Tensor):
            return [self.fresh(size, node, why) for size in value.shape]
        if isinstance(value, (tuple, list)):
            return tuple(
                [self.fresh(s, node, why) for s in v.shape] if isinstance(v, torch.Tensor) else None
                for v in value
            )
        return None

    def _classes(self, leaf: list[fx.Node]) -> Bases:
        members: dict[Variable, tuple[list[ParameterAxis], list[tuple[fx.Node, int]]]] = {}
        constant = set(leaf)
        for node, axes in self.axes.items():
            for dim, axis in enumerate(axes if isinstance(axes, list) else ()):
                factors = resolve(axis)
                for place, (variable, flipped) in enumerate(factors):
                    parameters, values = members.setdefault(variable, ([], []))
                    outer, inner = product(factors[:place]), product(factors[place + 1 :])
                    if node in constant:
                        parameters.append(ParameterAxis(node, dim, outer, variable.size, inner, flipped))
                    else:
                        values.append((node, dim))
        return self._numbered(members)

    def _numbered(self, members: dict[Variable, Any]) -> Bases:
        by_variable: dict[Variable, BasisClass] = {}
        counts: dict[str, int] = {}
        for variable, (parameters, values) in members.items():
            known = (
                variable.size,
                variable.group,
                parameters,
                values,
                variable.reasons,
                frozenset(variable.roles),
            )
            kind = BasisClass(*known).kind
            by_variable[variable] = BasisClass(*known, index=counts.get(kind, 0))
            counts[kind] = counts.get(kind, 0) + (bool(parameters) if kind == "inner" else 1)
        classes = [c for c in by_variable.values() if c.parameters]
        return Bases(classes, self.axes, by_variable)


def _fits(axes: Any, value: Any) -> bool:
    """Whether a rule accounted for every element along every axis of a result."""
    if isinstance(value, (tuple, list)):
        return isinstance(axes, tuple) and all(_fits(a, v) for a, v in zip(axes, value, strict=True))
    return isinstance(axes, list) and [product(resolve(a)) for a in axes] == list(value.shape)


def _flat(axes: Any) -> Iterator[Axis]:
    if isinstance(axes, list):
        yield from axes
    elif isinstance(axes, tuple):
        for part in axes:
            yield from _flat(part)
