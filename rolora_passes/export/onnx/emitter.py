"""The ONNX values of a graph's nodes, while they are written in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.inputs import Inputs
from rolora_passes.export.onnx.prepared import Node, Prepared, Reads
from rolora_passes.export.onnx.store import Store
from rolora_passes.export.onnx.writer import Writer


@dataclass(frozen=True)
class Heads:
    """A value [B, S, heads, width] that is held as `flat` [B, S, heads * width]."""

    flat: ir.Value
    count: int
    width: int


Result = ir.Value | Heads | tuple[ir.Value, ...]
Lowering = Callable[["OnnxEmitter", Node], Result]
"""Writes what computes a node, and returns its value."""


@dataclass(frozen=True)
class Match:
    """Nodes that are computed together.

    Attributes:
        root: where in the graph that is written, and after what it is named.
        gives: the nodes whose values it gives.
        reads: the nodes whose values it reads, parameters left out.
        write: writes it, and returns the values of `gives`.
    """

    root: fx.Node
    gives: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    write: Callable[[OnnxEmitter], Sequence[Result]]


Pattern = Callable[[Prepared, Node, Mapping[str, Lowering]], Match | None]
"""A match that gives a node's value by a kernel for several nodes; None if there is none."""


@dataclass(frozen=True)
class Kernels:
    """What a flavour has.

    Attributes:
        lowerings: by operator, its ATen or rolora name.
        inputs: what the model is fed, as the flavour's attention takes it.
        patterns: of several nodes, which are tried first.
        reads: what a lowering reads, where that is not all inputs of its node.
    """

    lowerings: Mapping[str, Lowering]
    inputs: type[Inputs]
    patterns: tuple[Pattern, ...] = ()
    reads: Mapping[str, Reads] = field(default_factory=dict)


class OnnxEmitter(Writer):
    """Writes one match after another, and keeps the values that they give.

    Attributes:
        graph: what is lowered.
        inputs: and outputs, of the model.
        levels: accuracy levels of the products with quantized weights.
        reader: the node that is being written, whose operands are read.
    """

    def __init__(self, graph: Prepared, inputs: type[Inputs], store: Store) -> None:
        super().__init__(store)
        self.graph, self.reader = graph, graph.module.graph.output_node()
        self.inputs = inputs(self, graph.inputs, graph.cached, graph.max_length)
        self.levels: set[int] = set()
        self._results: dict[fx.Node, Result] = {}
        self._wide: dict[fx.Node, ir.Value] = {}
        self._last: dict[ir.Value, ir.Value] = {}

    def write(self, match: Match) -> None:
        """Write a match, all of whose operands are written.

        Raises:
            LoweringError: it cannot be lowered as it is. Its values stand for nothing then.
        """
        self.reader = match.root
        self._results |= {node: ir.Value(name=node.name) for node in match.gives}
        with self.naming(match.root.name):
            self._results |= zip(match.gives, match.write(self), strict=True)

    def read_output(self) -> ir.Value:
        """What the graph returns, in a node of its own if it is one of the model's inputs."""
        self.reader = self.graph.module.graph.output_node()
        with self.naming(self.reader.name):
            value = self.value(self.reader.args[0])
            return self.op("Identity", value) if value.producer() is None else value

    def shape(self, node: Node) -> Any:
        return self.graph.shape(node)

    def rank(self, node: Node) -> int:
        return self.graph.rank(node)

    def result(self, node: fx.Node) -> Result:
        """What stands for a node that is written, or for a parameter or an input, which are made here."""
        if node not in self._results and node.op == "get_attr":
            self._results[node] = self.store.add(str(node.target), self.graph.parameter(node))
        if node not in self._results and node.op == "placeholder":
            with self.naming(node.name):
                self._results[node] = self.inputs.value(str(node.target))
        return self._results[node]

    def value(self, node: Node) -> ir.Value:
        """An operand of the node that is being written: a node's value in its own shape, or a number."""
        if not isinstance(node, fx.Node):
            known = self.reader in self.graph.shapes
            return self.value_of(node, self.graph.dtype(self.reader) if known else None)
        found = self.result(node)
        if isinstance(found, Heads):
            if node not in self._wide:
                self._wide[node] = self.reshape(found.flat, 0, 0, found.count, found.width)
            found = self._wide[node]
        assert isinstance(found, ir.Value)
        return self._as_read(node, found)

    def value_of(self, number: Any, dtype: torch.dtype | None) -> ir.Value:
        """An operand that may be a number, of this type (an integer, if there is none)."""
        if isinstance(number, fx.Node):
            return self.value(number)
        return self.numbers(number, dtype or torch.int64)

    def flat(self, node: fx.Node) -> ir.Value:
        """A value [B, S, heads, width] as [B, S, heads * width]."""
        found = self.result(node)
        value = found.flat if isinstance(found, Heads) else self.reshape(self.value(node), 0, 0, -1)
        return self._as_read(node, value)

    def row(self, node: fx.Node) -> ir.Value:
        """The rows of a table [1, max_length, ..] at the positions [B, S].

        Raises:
            LoweringError: positions lie along another axis.
        """
        table, dim = self.graph.tables[node]
        if dim != 1 or table.shape[0] != 1:
            raise LoweringError(f"expected a table [1, positions, ..], found positions along axis {dim}")
        rows = self.store.add(f"table.{node.name}", table[0])
        return self.op("Gather", rows, self.inputs.positions, axis=0)

    def _as_read(self, node: fx.Node, value: ir.Value) -> ir.Value:
        """The last token, where that is all that the node that is being written computes."""
        narrowed = self.graph.narrowed
        if self.reader not in narrowed or node in narrowed or node in self.graph.constants:
            return value
        if value not in self._last:
            self._last[value] = self.inputs.narrow(value)
        return self._last[value]
