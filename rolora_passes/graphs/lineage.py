"""What passes did to the axes of a linear's weight: its *way* from the model's parameter to what it is now.

Until fold-constants the way is the expression on the weight itself; it keeps it in the graph's metadata.
`axis_maps` carries a low-rank branch along it, or back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.graphs.axis_maps import Way as Way
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import (
    argument,
    constants,
    is_op,
    linears,
    parameter_names,
    root_names,
)
from rolora_passes.graphs.info import info, set_info
from rolora_passes.graphs.operators import operator_of
from rolora_passes.graphs.operators.steps import NoMap, Step
from rolora_passes.graphs.shapes import infer_shapes


def ways(graph: fx.GraphModule) -> dict[fx.Node, Way]:
    """The way of every linear's weight: what is kept of folded expressions, then the expression there is.

    A weight that something else than maps of one axis was done to has a `reason` in place of steps.
    """
    reader = _Reader(graph)
    return {node: reader.way(node) for node in linears(graph)}


def expressions(graph: fx.GraphModule) -> Callable[[fx.Node], Way]:
    """What gives the way of a linear's weight from the parameter that the graph has now.

    That is what is written on the parameter, and nothing that was folded before.
    """
    reader = _Reader(graph)
    reader.kept = {}
    return reader.way


def keep_ways(graph: fx.GraphModule, known: Mapping[fx.Node, Way]) -> None:
    """Keep the ways of linears, which `ways` found, under the names of the parameters they now read.

    What was kept of parameters that are gone goes too: another may be given such a name.
    """
    present = parameter_names(graph)
    kept = {name: way for name, way in info(graph).ways.items() if name in present}
    for linear, way in known.items():
        name = root_names(linear.args[1])[0]
        if way.steps or way.reason or name != way.root:
            kept[name] = dataclasses.replace(way, transposed=False)
    set_info(graph, ways=kept)


def keep_copy(graph: fx.GraphModule, name: str, copy: str) -> None:
    """Keep that a parameter is another's copy, so that its linears are called after what the model has."""
    kept = info(graph).ways
    set_info(graph, ways={**kept, copy: kept.get(name, _unchanged(name))})


def copies(graph: fx.GraphModule, name: str) -> list[str]:
    """The parameters that are one of the model's, or were made of it, in order of their names."""
    kept = info(graph).ways
    return sorted(n for n in parameter_names(graph) if kept.get(n, _unchanged(n)).root == name)


def _unchanged(name: str) -> Way:
    return Way(name, (), {})


def name_of(tensor: Tensor) -> str:
    """A name for a tensor that a step holds: a hash of its values, so that no two tensors share one."""
    values = tensor.detach().cpu().double().contiguous()
    digest = hashlib.sha256(json.dumps(list(values.shape)).encode())
    digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def plain(step: Step) -> list[Any]:
    """A step as JSON has it."""
    return [step.kind, step.side, step.place, list(step.numbers), list(step.tensors)]


def step_of(plain: list[Any]) -> Step:
    """The step that `plain` wrote."""
    kind, side, place, numbers, tensors = plain
    return Step(kind, side, place, tuple(numbers), tuple(tensors))


class _Reader:
    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.kept = info(graph).ways
        self.tensors: dict[str, Tensor] = {}
        self.shapes = infer_shapes(graph, only=constants(graph))
        self.names: dict[fx.Node, str] = {}

    def way(self, linear: fx.Node) -> Way:
        try:
            return self._way(linear)
        except NoMap as found:
            root = root_names(linear.args[1])[0]
            return Way(self.kept.get(root, _unchanged(root)).root, (), {}, str(found))

    def _way(self, linear: fx.Node) -> Way:
        chain: list[fx.Node] = []
        node: Any = linear.args[1]
        while node.op != "get_attr":
            chain.append(node)
            node = node.args[0]
        kept = self.kept.get(str(node.target), _unchanged(str(node.target)))
        if kept.reason:
            raise NoMap(kept.reason)
        found: list[Step] = []  # from the weight back to its parameter
        sides = ["out", "in"]
        shift = self._shift(linear)
        for op in chain:
            found += self._pushed(shift, op)
            found += self._steps(op, sides)
        found += self._pushed(shift, node)
        own = {name: self.tensors[name] for step in found for name in step.tensors}
        steps = (*kept.steps, *reversed(found))
        return Way(kept.root, steps, {**kept.tensors, **own}, transposed=sides == ["in", "out"])

    def _steps(self, node: fx.Node, sides: list[str]) -> list[Step]:
        """The map that a node is, and `sides` as they are of its operand."""
        known = operator_of(node)
        if known is None or known.axis_map is None:
            raise NoMap(f"{node.format_node()} is no map of one axis of a weight")
        self.sides = sides
        return known.axis_map.read(self, node)

    def shape(self, node: fx.Node) -> list[int]:
        return list(self.shapes[node].shape)

    def step(self, dim: int, kind: str, numbers: Sequence[int] = (), tensors: Sequence[str] = ()) -> Step:
        side = self.sides[dim]
        return Step(kind, side, self.sides[:dim].count(side), tuple(numbers), tuple(tensors))

    def tensor(self, node: fx.Node) -> str:
        """The name under which the value of an expression is kept."""
        if node not in self.names:
            value = compute(self.graph, [node], dtype=torch.float64)[0].cpu()  # as all that is remembered
            self.names[node] = name_of(value)
            self.tensors[self.names[node]] = value
        return self.names[node]

    def _shift(self, linear: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """(the weight as it was then, what was added to the input) if the linear's bias holds W·shift."""
        node = argument(linear, "bias")
        while isinstance(node, fx.Node) and node.op != "get_attr":
            if is_op(node, "linear"):
                return node.args[1], node.args[0]
            node = node.args[0]
        return None

    def _pushed(self, shift: tuple[fx.Node, fx.Node] | None, node: fx.Node) -> list[Step]:
        if shift is None or shift[0] is not node:
            return []
        return [Step("shift", "in", 0, (), (self.tensor(shift[1]),))]
