"""What an ONNX model is fed, and what its operators need of that: tokens, masks, positions, caches.

A batch may have rows of different lengths, padded on the left or on the right; `attention_mask` says which
columns are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import onnx_ir as ir
import torch
from torch import fx

from rolora_passes.export.onnx.runner import INPUTS
from rolora_passes.export.onnx.writer import Writer
from rolora_passes.graphs.graph import is_op

_END = torch.iinfo(torch.int64).max


class Inputs:
    """Inputs and outputs of the model, in order; subclasses give what their kind of attention reads.

    Attributes:
        tokens: int64 [B, S].
        positions: int64 [B, S].
        last: int64 [B, 1], the place in [0, S) of each row's last token.
    """

    tokens: ir.Value
    positions: ir.Value
    last: ir.Value

    def __init__(self, e: Writer, names: list[str], cached: bool, max_length: int) -> None:
        self.e, self.cached, self.max_length = e, cached, max_length
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.given = {
            name: self._input(INPUTS.get(name, name), ir.DataType.INT64, ["batch", _length(name)])
            for name in names
            if name != "positions"
        }
        total = "total_length" if cached else "length"
        self.mask = self._input("attention_mask", ir.DataType.INT64, ["batch", total])

    def value(self, name: str) -> ir.Value:
        """What stands for an input of the graph."""
        own = {"tokens": lambda: self.tokens, "positions": lambda: self.positions}
        return own[name]() if name in own else self.given[name]

    def cache(self, heads: int, width: int, *kept: fx.Node) -> tuple[ir.Value, ir.Value]:
        """The past keys and values of one more attention, [B, heads, past, width] each.

        Args:
            kept: the keys and values that go in.
        """
        for node in kept:
            if is_op(node, "fake_quantize", "fake_quantize_static"):
                self.e.note("keys or values are rounded, but held in float32, as the kernels hold them")
        number = sum(v.name.startswith("past_key") for v in self.inputs if v.name) // 2
        shape: list[int | str] = ["batch", heads, "past_length", width]
        key, value = (
            self._input(f"past_key_values.{number}.{kind}", ir.DataType.FLOAT, shape)
            for kind in ("key", "value")
        )
        return key, value

    def present(self, values: tuple[ir.Value, ir.Value], heads: int, width: int) -> None:
        """Have the model return an attention's keys and values, past and new."""
        number = len(self.outputs) // 2
        for value, kind in zip(values, ("key", "value"), strict=True):
            value.name = f"present.{number}.{kind}"
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape(["batch", heads, "total_length", width])
            self.outputs.append(value)

    def narrow(self, value: ir.Value) -> ir.Value:
        """Each row's last token of a value [B, S, ..]: [B, 1, ..]."""
        return self.e.op("GatherND", value, self._last_index, batch_dims=1)

    @cached_property
    def _last_index(self) -> ir.Value:
        return self.e.op("Unsqueeze", self.last, self.e.integers(-1))

    def _input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))
        self.inputs.append(value)
        return value

    def length(self, value: ir.Value) -> ir.Value:
        """How many columns a value [B, n] has: int64 [1]."""
        return self.e.op("Shape", value, start=1, end=2)

    @cached_property
    def count(self) -> ir.Value:
        """S: int64 [1]."""
        return self.length(self.given["tokens"])

    @cached_property
    def new_mask(self) -> ir.Value:
        """The columns of the mask that this call computes, [B, S]."""
        start = self.e.op("Neg", self.count)
        return self.e.op("Slice", self.mask, start, self.e.integers(_END), self.e.integers(1))

    def columns(self, count: ir.Value) -> ir.Value:
        """0 .. n - 1 for n int64 [1]: int64 [n]."""
        zero, one = (self.e.numbers(n, torch.int64) for n in (0, 1))
        return self.e.op("Range", zero, self.e.op("Squeeze", count), one)


class CompactInputs(Inputs):
    """For caches without gaps, as GroupQueryAttention keeps them: every row is moved to the left edge first.

    Position s of a row is then its s-th token, whichever side it was padded on, and what stands behind the
    last token is never attended to.
    """

    @cached_property
    def tokens(self) -> ir.Value:  # type: ignore[override]
        first = self.e.op("ArgMax", self.new_mask, axis=1)
        places = self.e.op("Mod", self.e.op("Add", self.columns(self.count), first), self.count)
        return self.e.op("GatherElements", self.given["tokens"], places, axis=1)

    @cached_property
    def positions(self) -> ir.Value:  # type: ignore[override]
        past = self.e.op("Sub", self._tokens_in(self.mask), self._tokens_in(self.new_mask))
        places = self.e.op("Add", past, self.columns(self.count))
        highest = self.e.numbers(self.max_length - 1, torch.int64)
        return self.e.op("Min", places, highest)  # what pads a row may lie behind the tables

    @cached_property
    def last(self) -> ir.Value:  # type: ignore[override]
        behind = self.e.op("Sub", self._tokens_in(self.new_mask), self.e.integers(1))
        return self.e.op("Max", behind, self.e.integers(0))

    @cached_property
    def last_positions(self) -> ir.Value:
        """The position of each row's last token, int32 [B]: how many its cache has, less one."""
        count = self.e.op("ReduceSum", self.mask, self.e.integers(1), keepdims=0)
        less = self.e.op("Sub", count, self.e.integers(1))
        return self.e.op("Cast", less, to=ir.DataType.INT32)

    @cached_property
    def total(self) -> ir.Value:
        """The columns of the mask, past and new: int32, no axes."""
        count = self.e.op("Squeeze", self.length(self.mask))
        return self.e.op("Cast", count, to=ir.DataType.INT32)

    def _tokens_in(self, mask: ir.Value) -> ir.Value:
        return self.e.op("ReduceSum", mask, self.e.integers(1), keepdims=1)


class MaskedInputs(Inputs):
    """For attention that is told what it may see, with or without caches."""

    @cached_property
    def tokens(self) -> ir.Value:  # type: ignore[override]
        return self.given["tokens"]

    @cached_property
    def positions(self) -> ir.Value:  # type: ignore[override]
        return self._newest(self.key_positions)

    @cached_property
    def key_positions(self) -> ir.Value:
        """How many tokens stand before each column of a row, [B, T]."""
        count = self.e.op("CumSum", self.mask, self.e.numbers(1, torch.int64))
        return self.e.op("Max", self.e.op("Sub", count, self.e.integers(1)), self.e.integers(0))

    @cached_property
    def last(self) -> ir.Value:  # type: ignore[override]
        return self.e.op("ArgMax", self.new_mask, axis=1, select_last_index=1)

    @cached_property
    def keys(self) -> ir.Value:
        """Which of the keys are tokens: bool [B, 1, 1, T]."""
        seen = self.e.op("Cast", self.mask, to=ir.DataType.BOOL)
        return self.e.op("Unsqueeze", seen, self.e.integers(1, 2))

    def seen_keys(self, query: ir.Value) -> ir.Value:
        """`keys` for every query of a value [B, S, ..], spelt out for all runtimes: bool [B, 1, S, T]."""
        one = self.e.integers(1)
        shape = self.e.op("Concat", one, one, self.length(query), one, axis=0)
        return self.e.op("Expand", self.keys, shape)

    def visible(self, window: int | None, causal: bool = True) -> ir.Value:
        """Which keys every query sees: bool [B, 1, S, T].

        Args:
            window: only the last so many up to itself, or so many to either side where it is not causal.
        """
        if (window, causal) not in self._visible:
            self._visible[window, causal] = self._seen(window, causal)
        return self._visible[window, causal]

    @cached_property
    def _visible(self) -> dict[tuple[int | None, bool], ir.Value]:
        return {}

    def _seen(self, window: int | None, causal: bool) -> ir.Value:
        """By positions: a row that is padded on the right has a gap before what follows its prompt."""
        op, last, first = self.e.op, self.e.integers(-1), self.e.integers(1)
        key, query = op("Unsqueeze", self.key_positions, first), op("Unsqueeze", self.positions, last)
        far = self.e.integers(_END // 2 if window is None else window)
        seen = op("Greater", key, op("Sub", query, far))  # [B, S, T]
        edge = query if causal else op("Add", query, op("Sub", far, first))
        seen = op("And", seen, op("LessOrEqual", key, edge))
        seen = op("And", op("Unsqueeze", seen, first), self.keys)
        columns = self.columns(self.length(self.mask))
        itself = op("Equal", columns, op("Unsqueeze", self._newest(columns, 0), last))
        return op("Or", seen, itself)  # what pads a row sees itself, lest it be NaN

    def _newest(self, value: ir.Value, axis: int = 1) -> ir.Value:
        """The last S along an axis."""
        start = self.e.op("Neg", self.count)
        return self.e.op("Slice", value, start, self.e.integers(_END), self.e.integers(axis))


def _length(name: str) -> str:
    return "length" if name == "tokens" else f"{name}_length"
