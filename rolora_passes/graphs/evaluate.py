"""Values of expressions over parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from rolora_passes.graphs.devices import place_of, written_for
from rolora_passes.graphs.dtypes import retyped
from rolora_passes.graphs.graph import constants, get_tensor, upstream
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.operators import operator_of

# Elements evaluated at a time where rows are independent (a token table): 8 MB in float64.
_BLOCK = 1 << 20


def evaluate(graph: fx.GraphModule, nodes: list[fx.Node]) -> list[Tensor]:
    """The values of constant expressions over the same parameters, computed in float64.

    Expressions that work on every row for itself are evaluated in blocks of rows.
    """
    rows = _independent_rows(graph, nodes)
    if rows is None:
        return compute(graph, nodes, dtype=torch.float64)
    count, width = rows
    step = max(1, _BLOCK // width)
    results: list[Tensor] = []
    for start in range(0, count, step):
        parts = compute(graph, nodes, dtype=torch.float64, rows=slice(start, start + step))
        results = results or [part.new_empty(count, *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[start : start + step] = part
    return results


def compute(
    graph: fx.GraphModule,
    nodes: list[fx.Node],
    inputs: Mapping[fx.Node, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    rows: slice | None = None,
) -> list[Any]:
    """The values of expressions over parameters, and over inputs where those are given.

    Args:
        dtype: the type to compute in: floating-point parameters are cast to it, and casts to others are to
            it. None: in their own.
        rows: of every parameter that has some; None for all.

    Returns: values where the graph is computed (`graphs.devices`).
    """
    steps, place = sorted(upstream(nodes)), place_of(graph, dtype)
    dead = deaths(steps, nodes)
    done: dict[fx.Node, Any] = dict(inputs or {})
    with torch.no_grad():
        for step in steps:
            if step.op == "get_attr":
                tensor = place.fetch(get_tensor(graph, str(step.target))).detach()
                tensor = tensor[rows] if rows is not None and tensor.dim() > 1 else tensor
                done[step] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            elif step not in done:
                done[step] = call(step, done.__getitem__, dtype, place.device)
            for value in dead[step]:
                del done[value]
    return [done[node] for node in nodes]


def call(
    node: fx.Node,
    value_of: Callable[[fx.Node], Any],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Any:
    """What a node's operator gives for the values of its operands; computed in `dtype`, and on `device`, if
    they are given."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    if device is not None:
        kwargs = written_for(kwargs, device)
    if dtype is not None:
        args, kwargs = retyped((args, kwargs), lambda _: dtype)
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def values_in(
    graph: fx.GraphModule,
    tokens: Tensor,
    dtype: torch.dtype,
    changed: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> Iterator[tuple[fx.Node, Any]]:
    """Every node with its value where a graph is computed in another type than its own, without a copy of it.

    A parameter is cast when it is read and kept no longer. A constant expression is evaluated before its
    first reader: the nodes come in that order.

    Args:
        tokens: int64 [B, S].
        dtype: of every floating-point value.
        changed: what to compute with in place of a parameter, given its name and its value in its own type.
    """
    steps, place = _just_in_time(graph), place_of(graph, dtype)
    dead, given = deaths(steps, ()), iter(inputs_for(graph, tokens).values())
    done: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        if node.op != "get_attr":
            return done[node]
        tensor = place.fetch(get_tensor(graph, str(node.target))).detach()
        return _cast(changed(str(node.target), tensor), dtype)

    for step in steps:
        with torch.no_grad():
            if step.op == "placeholder":
                done[step] = next(given).to(place.device)
            elif step.op == "output":
                done[step] = fx.node.map_arg(step.args[0], value_of)
            else:
                found = call(step, value_of, dtype, place.device)
                done[step] = fx.node.map_aggregate(found, lambda v: _cast(v, dtype))
        yield step, done[step]
        for value in dead[step]:
            done.pop(value, None)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _just_in_time(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes that compute, each constant one right before the first that reads it."""
    known = constants(graph)
    order: dict[fx.Node, None] = {}

    def place(node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand in known and operand not in order:
                place(operand)
        if node.op != "get_attr":
            order[node] = None

    for node in graph.graph.nodes:
        if node not in known:
            place(node)
    return list(order)


def deaths(steps: Collection[fx.Node], kept: Collection[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every step, the values that no step after it reads, those to be kept excepted."""
    last = {value: step for step in steps for value in (step, *step.all_input_nodes)}
    dead: dict[fx.Node, list[fx.Node]] = {step: [] for step in steps}
    for value, step in last.items():
        if value not in kept:
            dead[step].append(value)
    return dead


def _independent_rows(graph: fx.GraphModule, nodes: list[fx.Node]) -> tuple[int, int] | None:
    """(rows, width) of the one table under large expressions that treat every row for itself, else None."""
    tables = set()
    for node in upstream(nodes):
        known = operator_of(node)
        if node.op == "get_attr":
            tensor = get_tensor(graph, str(node.target))
            if tensor.dim() > 1:
                tables.add((node, tensor.shape))
        elif known is None or known.by_row is None or not known.by_row(node):
            return None
    if len(tables) != 1:
        return None
    ((_, shape),) = tables
    return (shape[0], shape[1]) if len(shape) == 2 and shape.numel() > 2 * _BLOCK else None
