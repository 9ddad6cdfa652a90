"""Solving for a parameter: what it must be for expressions over it to have given values.

An expression is undone from its outside: a view is undone by a view, `w + 1` by a subtraction, and what takes
a part of a parameter (a slice of fused projections) is written into that part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import LoweringError
from rolora_passes.graphs.evaluate import call, evaluate
from rolora_passes.graphs.graph import get_tensor, is_op, op_name
from rolora_passes.graphs.operators import Trait, has
from rolora_passes.ondisk import rest

_SAME = 1e-9  # of values in float64 that went through an expression and back
# Views that keep all elements in their order.
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")
_PARTS = ("slice", "select", "narrow")
_INVERSE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "add": lambda value, number: value - number,
    "sub": lambda value, number: value + number,
    "mul": lambda value, number: value / number,
    "div": lambda value, number: value * number,
}


@dataclass(frozen=True)
class Equation:
    """An expression over the model's parameters, and the value that it must have.

    Attributes:
        own: a constant node of the model's graph.
        value: a node of the graph, constant or the dequantized half of what is; or a number, all over.
        reader: what reads `own` in the model's graph.
    """

    own: fx.Node
    value: fx.Node | float
    reader: fx.Node


def can_undo(node: fx.Node) -> bool:
    """Whether an expression over parameters is made of one, and of steps that `solve` undoes."""
    while node.op != "get_attr":
        if len(node.all_input_nodes) != 1 or is_op(node, "expand") or not (_inverse(node) or _moves(node)):
            return False
        node = node.all_input_nodes[0]
    return True


def solve(
    graph: fx.GraphModule, own: fx.GraphModule, name: str, equations: Sequence[Equation], dtype: torch.dtype
) -> Tensor:
    """A parameter of the model, such that all equations hold.

    Args:
        graph: which the equations' values are of.
        own: the model's graph, which has the parameter; what no equation says of it stays as it is there.
        name: the parameter.
        equations: over this parameter alone.
        dtype: the type to return it in; what is computed is computed in float64, and cast once.

    Raises:
        LoweringError: no value of the parameter solves them, or this does not know how to find it.
    """
    before = get_tensor(own, name).detach()
    first, plain = equations[0], equations[0].own
    while has(plain, Trait.CAST):
        plain = plain.all_input_nodes[0]
    if len(equations) == 1 and plain.op == "get_attr":
        return value_of(graph, first.value, before.shape, dtype)
    found = before.to(torch.float64, copy=True)
    values = [value_of(graph, e.value, (), torch.float64) for e in equations]
    for equation, value in zip(equations, values, strict=True):
        _put(equation.own, value, found)
    for equation, value in zip(equations, values, strict=True):
        again = _shown(equation.own, found)
        if not torch.allclose(again, value.expand_as(again), rtol=_SAME, atol=_SAME):
            raise LoweringError(
                f"the graph has different values for parts of {name} that the model holds in one "
                f"({equation.own.format_node()}): a checkpoint of the model cannot hold both"
            )
    return found.to(dtype)


def value_of(
    graph: fx.GraphModule, value: fx.Node | float, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The value of an equation, computed in float64 where it is computed, and cast once."""
    if not isinstance(value, fx.Node):
        return torch.full([*shape], value, dtype=dtype)
    if value.op == "get_attr":
        tensor = get_tensor(graph, str(value.target))
        copy = tensor.detach().to(dtype, copy=True)
        rest(tensor)
        return copy
    (found,) = evaluate(graph, [value], dtype)
    return found


def _put(node: fx.Node, value: Tensor, parameter: Tensor) -> None:
    """Write what an expression is to be into the parameter that it is of."""
    while node.op != "get_attr":
        operand: Any = node.args[0]
        if is_op(node, *_RESHAPES):
            value = value if value.dim() == 0 else value.reshape(_shown(operand, parameter).shape)
        elif inverse := _inverse(node):
            value = inverse(value, node.args[1])
        elif not has(node, Trait.CAST):
            break
        node = operand
    place = parameter if node.op == "get_attr" else _shown(node, parameter)
    if place.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        raise LoweringError(
            f"{node.format_node()}, which the model computes of a parameter, cannot be undone: a checkpoint "
            "cannot hold what passes made of it"
        )
    place.copy_(value)


def _moves(node: fx.Node) -> bool:
    return has(node, Trait.VIEW | Trait.CAST) or is_op(node, *_RESHAPES, *_PARTS)


def _inverse(node: Any) -> Callable[[Tensor, Any], Tensor] | None:
    """What undoes a node that computes with a number."""
    plain = is_op(node, *_INVERSE) and isinstance(node.args[0], fx.Node) and len(node.args) == 2
    if not plain or node.kwargs or not isinstance(node.args[1], (int, float)):
        return None
    return _INVERSE[op_name(node)]


def _shown(node: fx.Node, parameter: Tensor) -> Tensor:
    """The value of an expression over one parameter; of views alone, a view of it."""
    if node.op == "get_attr":
        return parameter
    found: Tensor = call(node, lambda operand: _shown(operand, parameter), torch.float64)
    return found
