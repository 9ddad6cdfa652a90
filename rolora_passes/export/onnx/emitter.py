"""Writing ONNX nodes for the nodes of a graph: the values they make, their shapes, and what is constant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor, fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.store import Store
from rolora_passes.graphs.buffers import constant_nodes
from rolora_passes.graphs.graph import get_tensor, op_name
from rolora_passes.graphs.shapes import infer_symbols

if TYPE_CHECKING:
    from rolora_passes.export.onnx.inputs import Inputs

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Heads:
    """A value [B, S, heads, width] that is held as `flat` [B, S, heads * width]."""

    flat: ir.Value
    count: int
    width: int


Node = Any
"""An `fx.Node`; to a type checker `Any`, for what its arguments are its operator says."""
Result = ir.Value | Heads | tuple[ir.Value, ...]
Lowering = Callable[["Emitter", Node], Result]


@dataclass(frozen=True)
class Settings:
    """What a lowering is asked for; see `to_onnx`."""

    max_length: int
    accuracy_level: int | None


class Emitter:
    """Holds the ONNX values of a graph's nodes while its operators are lowered, on demand.

    Args:
        table: for each operator (its ATen or rolora name), the function that lowers it.
    """

    def __init__(
        self, graph: fx.GraphModule, table: Mapping[str, Lowering], store: Store, settings: Settings
    ) -> None:
        self.graph, self.table, self.store, self.settings = graph, table, store, settings
        self.tape = Tape()
        self.shapes = infer_symbols(graph)
        self.constants = constant_nodes(graph.graph)
        self.results: dict[fx.Node, Result] = {}
        self.notes: dict[str, int] = {}
        self.levels: set[int] = set()
        """Accuracy levels of the products with quantized weights."""
        self.shared: dict[Any, ir.Value] = {}
        """Values that several lowerings use, by what they are."""
        self.inputs: Inputs
        self.tables: dict[fx.Node, tuple[Tensor, int]] = {}
        """Values that depend on positions alone, at every position; see `positions.tabulate`."""
        self.narrowed: set[fx.Node] = set()
        """Nodes whose last token alone is computed."""
        self.current: fx.Node = graph.graph.output_node()
        self._wide: dict[fx.Node, ir.Value] = {}
        self._last: dict[ir.Value, ir.Value] = {}

    # Making nodes

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One ONNX node of one output."""
        return self.ops(kind, *inputs, domain=domain, outputs=1, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """One ONNX node of several outputs, named after the node that is being lowered."""
        found = self.tape.op_multi_out(kind, inputs, attributes or None, num_outputs=outputs, domain=domain)
        node = found[0].producer()
        assert node is not None
        node.name = f"{self.current.name}/{kind}.{len(self.tape.nodes)}"
        for index, value in enumerate(found):
            value.name = f"{node.name}:{index}"
        return found

    def numbers(self, values: int | float | Sequence[int] | Sequence[float], dtype: torch.dtype) -> ir.Value:
        """A small constant, made once: a number (no axes) or a list (one axis)."""
        key = ("numbers", dtype, tuple(values) if isinstance(values, Sequence) else values)
        if key not in self.shared:
            self.shared[key] = self.store.add("constant", torch.tensor(values, dtype=dtype))
        return self.shared[key]

    def integers(self, *values: int) -> ir.Value:
        """int64 [n]: axes, sizes, starts."""
        return self.numbers(values, torch.int64)

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """0 keeps an axis as it is, -1 takes what is left."""
        return self.op("Reshape", value, self.integers(*sizes))

    def slice(self, value: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        return self.op("Slice", value, *(self.integers(n) for n in (start, end, axis)))

    def note(self, text: str) -> None:
        """Something the report tells, with how often it was so."""
        self.notes[text] = self.notes.get(text, 0) + 1

    # Reading nodes

    def shape(self, node: Node) -> Any:
        """Its sizes: a number, the name of a dynamic one, or None for what follows from those."""
        return self.shapes[node][0]

    def rank(self, node: Node) -> int:
        return len(self.shapes[node][0])

    def parameter(self, node: fx.Node) -> Tensor:
        """The tensor of a constant node.

        Raises:
            LoweringError: it is an expression; FoldConstants evaluates those.
        """
        if node.op != "get_attr":
            raise LoweringError(
                f"expected a parameter, found the expression `{node.name}`: run fold-constants"
            )
        return get_tensor(self.graph, str(node.target))

    def result(self, node: fx.Node) -> Result:
        """What a node was lowered to; lowered now, if it was not yet."""
        if node not in self.results:
            before, self.current = self.current, node
            try:
                self.results[node] = self._lower(node)
            finally:
                self.current = before
        return self.results[node]

    def _lower(self, node: fx.Node) -> Result:
        if node.op == "placeholder":
            kept = {"tokens": "tokens", "positions": "positions"}.get(str(node.target))
            return getattr(self.inputs, kept) if kept else self.inputs.given[str(node.target)]
        if node.op == "get_attr":
            return self.store.add(str(node.target), self.parameter(node))
        if node in self.tables:
            return self._row(node, *self.tables[node])
        name = op_name(node)
        if name not in self.table:
            raise LoweringError(f"no lowering of {node.target}")
        return self.table[name](self, node)

    def _row(self, node: fx.Node, table: Tensor, dim: int) -> ir.Value:
        """The rows of a table [1, max_length, ..] at the positions [B, S]."""
        if dim != 1 or table.shape[0] != 1:
            raise LoweringError(f"expected a table [1, positions, ..], found positions along axis {dim}")
        rows = self.store.add(f"table.{node.name}", table[0])
        return self.op("Gather", rows, self.inputs.positions, axis=0)

    def value(self, node: Node) -> ir.Value:
        """An operand of the node that is being lowered: a node's value in its own shape, or a number."""
        if not isinstance(node, fx.Node):
            return self.value_of(node, self.shapes[self.current][1] if self.current in self.shapes else None)
        found = self.result(node)
        if isinstance(found, Heads):
            if node not in self._wide:
                self._wide[node] = self.reshape(found.flat, 0, 0, found.count, found.width)
            found = self._wide[node]
        assert isinstance(found, ir.Value)
        return self._narrowed(node, found)

    def value_of(self, number: Any, dtype: torch.dtype | None) -> ir.Value:
        """An operand that may be a number, of this type (an integer, if there is none)."""
        if isinstance(number, fx.Node):
            return self.value(number)
        return self.numbers(number, dtype or torch.int64)

    def flat(self, node: fx.Node) -> ir.Value:
        """A value [B, S, heads, width] as [B, S, heads * width]."""
        found = self.result(node)
        value = found.flat if isinstance(found, Heads) else self.reshape(self.value(node), 0, 0, -1)
        return self._narrowed(node, value)

    def _narrowed(self, node: fx.Node, value: ir.Value) -> ir.Value:
        """What the node that is being lowered reads: the last token, if that is all it computes."""
        if self.current not in self.narrowed or node in self.narrowed or node in self.constants:
            return value
        if value not in self._last:
            self._last[value] = self.inputs.narrow(value)
        return self._last[value]
