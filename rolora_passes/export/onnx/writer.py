"""Writing ONNX nodes, whatever graph they are for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from rolora_passes.export.onnx.store import Store

MICROSOFT = "com.microsoft"


class Writer:
    """Nodes and constants of an ONNX model, in the order in which they are written.

    Attributes:
        scope: what the names of nodes begin with.
        shared: values that are made once, by what they are.
        notes: what the report tells, with how often it was so.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.tape, self.scope = store, Tape(), ""
        self.shared: dict[Any, ir.Value] = {}
        self.notes: dict[str, int] = {}

    @contextmanager
    def naming(self, scope: str) -> Iterator[None]:
        """What is written in the block has names that begin so."""
        before, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = before

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node of one output."""
        return self.ops(kind, *inputs, domain=domain, outputs=1, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """One node of several outputs."""
        found = self.tape.op_multi_out(kind, inputs, attributes or None, num_outputs=outputs, domain=domain)
        node = found[0].producer()
        assert node is not None
        node.name = f"{self.scope}/{kind}.{len(self.tape.nodes)}"
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
        """Have the report tell something."""
        self.notes[text] = self.notes.get(text, 0) + 1
