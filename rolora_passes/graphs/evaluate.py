"""Values of expressions over parameters, with the memory of what is read just now."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from rolora_passes.graphs.devices import Place, place_of, written_for
from rolora_passes.graphs.dtypes import retyped
from rolora_passes.graphs.graph import get_tensor, upstream
from rolora_passes.graphs.operators import operator_of
from rolora_passes.moved import old_names
from rolora_passes.ondisk import is_on_disk, require_whole, rest

# Elements evaluated at a time where rows are independent: what stays in a core's cache in float64.
_BLOCK = 1 << 17
# Elements of a matrix that is evaluated whole.
SMALL = 1 << 21

Change = Callable[[str, Tensor], Tensor]
"""What to compute with in place of a parameter, or of rows of it, given its name and the values."""


def evaluate(graph: fx.GraphModule, nodes: list[fx.Node], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The values of constant expressions over the same parameters, computed in float64.

    Expressions that work on every row for itself are evaluated in blocks of rows.

    Args:
        dtype: of floating-point values, which are cast once.
    """
    results: list[Tensor] = []
    for place, parts in blocks(graph, nodes, torch.float64):
        cast = [part.to(dtype) if part.is_floating_point() else part for part in parts]
        if place.whole:
            return cast
        results = results or [part.new_empty(place.count, *part.shape[1:]) for part in cast]
        for result, part in zip(results, cast, strict=True):
            result[place.rows] = part
    return results


def blocks(
    graph: fx.GraphModule,
    nodes: list[fx.Node],
    dtype: torch.dtype | None = None,
    change: Change | None = None,
    only: Tensor | None = None,
) -> Iterator[tuple[Part, list[Tensor]]]:
    """The values of constant expressions over the same parameters, rows by rows where their rows are
    independent, else at once.

    Args:
        dtype: the type to compute in; None: each operator in its own.
        only: numbers of rows, int64 [n]: these alone, at once, if rows are independent.

    Yields: which rows of how many, and their values for every node.
    """
    found = _apart(graph, nodes)
    given = {} if found is None else {node: _whole(graph, node, dtype, change) for node in found.whole}
    rows = None if found is None else _rows(graph, found, given)
    if rows is None:
        values = compute(graph, nodes, given, dtype, change=change)
        count = len(values[0]) if values[0].dim() else 1
        yield Part(slice(0, count), count), values
        return
    step = max(1, _BLOCK * rows.count // rows.size)
    places = [slice(start, min(start + step, rows.count)) for start in range(0, rows.count, step)]
    for place in places if only is None else [only]:
        sliced = {node: _sliced(value, rows, place) for node, value in given.items() if node in rows.aligned}
        values = compute(graph, nodes, {**given, **sliced}, dtype, (rows, place), change)
        yield Part(place, rows.count), values
        del values
        for node in nodes:
            if node.op == "get_attr":
                let_go(graph, node, (rows, place))
    for node in rows.aligned:  # a block reads pages of its neighbours
        if node.op == "get_attr":
            let_go(graph, node)


@dataclass(frozen=True)
class Part:
    """Rows of a matrix that has `count`: a slice, or their numbers, int64 [n].

    Values that came at once are whole, each with its own count.
    """

    rows: slice | Tensor
    count: int

    @property
    def whole(self) -> bool:
        return isinstance(self.rows, slice) and self.rows == slice(0, self.count)


@dataclass(frozen=True)
class _Apart:
    """Expressions that work on every row of tensors for itself.

    Attributes:
        whole: what is to be computed before that: what mixes rows, or is no row (a rotation).
        aligned: what is cut into rows: parameters, and some of `whole`.
    """

    whole: list[fx.Node]
    aligned: set[fx.Node]


@dataclass(frozen=True)
class _Rows:
    """How many rows there are, of tensors of so many axes and elements; `aligned` as of `_Apart`."""

    count: int
    rank: int
    size: int
    aligned: set[fx.Node]


def _apart(graph: fx.GraphModule, nodes: list[fx.Node]) -> _Apart | None:
    """How large expressions fall apart into rows; None if they are small, or do not."""
    roots = [get_tensor(graph, str(n.target)) for n in upstream(nodes) if n.op == "get_attr"]
    if sum(root.numel() for root in roots) <= SMALL:
        return None
    inner, whole, aligned, sides = set[fx.Node](), dict[fx.Node, None](), set[fx.Node](), set[fx.Node]()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in inner or node in aligned:
            continue
        known = operator_of(node)
        rows = known.by_row(node) if known is not None and known.by_row is not None else []
        if not rows:
            aligned.add(node)
            if node.op != "get_attr":
                whole[node] = None
            continue
        inner.add(node)
        stack.extend(n for n in node.all_input_nodes if n in rows)
        sides.update(n for n in node.all_input_nodes if n not in rows)
    plain = all(node.op == "get_attr" for node in nodes)
    return None if not (inner or plain) or sides & (inner | aligned) else _Apart([*whole, *sides], aligned)


def _rows(graph: fx.GraphModule, found: _Apart, given: Mapping[fx.Node, Any]) -> _Rows | None:
    """The rows of the largest tensor that is cut; None if it has none."""
    tables = [given[n] if n in given else get_tensor(graph, str(n.target)) for n in found.aligned]
    largest = max(tables, key=Tensor.numel)
    lengths = {len(table) for table in tables if table.dim() == largest.dim()} - {1}
    if largest.dim() < 2 or len(largest) < 2 or len(lengths) > 1:
        return None
    return _Rows(len(largest), largest.dim(), largest.numel(), found.aligned)


def cut(graph: fx.GraphModule, node: fx.Node) -> frozenset[fx.Node]:
    """What of a large expression is cut into rows: expressions of which it is the same go together."""
    found = _apart(graph, [node])
    return frozenset(() if found is None else found.aligned)


def rows_apart(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether every row of a large constant expression can be computed for itself."""
    found = _apart(graph, [node])
    return found is not None and not any(n in found.aligned for n in found.whole)


def _whole(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype | None, change: Change | None) -> Tensor:
    """The value of an operator that mixes rows; what it reads may still be evaluated in blocks."""
    if node.op == "get_attr":
        return cast(Tensor, compute(graph, [node], dtype=dtype, change=change)[0])
    given = dict[fx.Node, Any]()
    for operand in node.all_input_nodes:
        if operand.op == "get_attr":
            given[operand] = _whole(graph, operand, dtype, change)
            continue
        parts = [part for _, (part,) in blocks(graph, [operand], dtype, change)]
        given[operand] = parts[0] if len(parts) == 1 else torch.cat(parts)
        del parts
    return cast(Tensor, compute(graph, [node], given, dtype, change=change)[0])


def _sliced(value: Any, found: _Rows, rows: slice | Tensor) -> Any:
    """The rows of a tensor that has them; another is given to every row."""
    cut = isinstance(value, Tensor) and value.dim() == found.rank and len(value) == found.count
    return value[rows] if cut else value


def compute(
    graph: fx.GraphModule,
    nodes: list[fx.Node],
    inputs: Mapping[fx.Node, Any] | None = None,
    dtype: torch.dtype | None = None,
    rows: tuple[_Rows, slice | Tensor] | None = None,
    change: Change | None = None,
) -> list[Any]:
    """The values of expressions over parameters, and over inputs where those are given.

    Args:
        dtype: the type to compute in: floating-point parameters are cast to it, and casts to others are to
            it. None: in their own.
        rows: of every parameter that has some; None for all.
        change: see `Change`.

    Returns: values where the graph is computed (`graphs.devices`).
    """
    done: dict[fx.Node, Any] = dict(inputs or {})
    steps, place = sorted(_needed(nodes, done)), place_of(graph, dtype)
    dead = deaths(steps, nodes)
    with torch.no_grad():
        for step in steps:
            if step not in done:
                if step.op == "get_attr":
                    done[step] = parameter(graph, step, place, dtype, rows, change)
                else:
                    done[step] = call(step, done.__getitem__, dtype, place.device)
            for value in dead[step]:
                if done.pop(value, None) is not None and value.op == "get_attr":
                    let_go(graph, value, rows)
    return [done[node] for node in nodes]


def _needed(nodes: list[fx.Node], known: Mapping[fx.Node, Any]) -> set[fx.Node]:
    """Nodes and what they are computed from, back to what is known."""
    found, stack = set[fx.Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(() if node in known else node.all_input_nodes)
    return found


def parameter(
    graph: fx.GraphModule,
    node: fx.Node,
    place: Place,
    dtype: torch.dtype | None,
    rows: tuple[_Rows, slice | Tensor] | None = None,
    change: Change | None = None,
) -> Tensor:
    """The tensor of a `get_attr` node, or rows of it, as `compute` reads it."""
    name = str(node.target)
    tensor = get_tensor(graph, name)
    require_whole(tensor)
    tensor = place.fetch(tensor).detach()
    if rows is not None and node in rows[0].aligned:
        tensor = _sliced(tensor, *rows)
    if change is not None:
        tensor = change(name, tensor)
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def let_go(graph: fx.GraphModule, node: fx.Node, rows: tuple[_Rows, slice | Tensor] | None = None) -> None:
    """Let a parameter that lies on disk go: nothing reads it just now."""
    tensor = get_tensor(graph, str(node.target))
    if is_on_disk(tensor):
        rest(tensor, None if rows is None or isinstance(rows[1], Tensor) else _sliced(tensor, *rows))


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


def deaths(steps: Collection[fx.Node], kept: Collection[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every step, the values that no step after it reads, those to be kept excepted."""
    last = {value: step for step in steps for value in (step, *step.all_input_nodes)}
    dead: dict[fx.Node, list[fx.Node]] = {step: [] for step in steps}
    for value, step in last.items():
        if value not in kept:
            dead[step].append(value)
    return dead


old_names(globals())
