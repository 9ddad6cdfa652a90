"""Shapes and types of a graph's values, by torch's own fake tensors: nothing is computed.

Batch and lengths are symbols; every symbol also has a size, of which the numbers are made. Calls that are
alike but for their parameters' values are propagated once, in whatever graph they are: a model costs what one
of its layers does, and the second time nothing.

Capture has its shapes of torch.export (`shape_of`), which propagates in the same way.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from rolora_passes.errors import GraphFormatError
from rolora_passes.graphs.inputs import BATCH as BATCH
from rolora_passes.graphs.inputs import DECODER_SEQUENCE as DECODER_SEQUENCE
from rolora_passes.graphs.inputs import SEQUENCE as SEQUENCE
from rolora_passes.graphs.inputs import input_names, require_known
from rolora_passes.graphs.operators import operator_of

Shape = tuple[int | None, ...]
"""Sizes of one tensor; None where the size follows the sequence length."""
Symbols = tuple[int | str | None, ...]
"""Sizes of one tensor: numbers, names of symbols, None for what follows from these."""

# Calls to remember before all are forgotten: ten times what a large model has that are not alike.
_MOST = 10_000
# How many tokens a graph with caches is given: fewer than any cache holds.
_FEW = 7
_CPU = torch.device("cpu")


def shape_of(node: object) -> Any:
    """A node's shape: ints, strings for symbolic sizes; None where capture recorded no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def same_shape(first: fx.Node, second: fx.Node) -> bool:
    """Whether two nodes have the same known shape."""
    return shape_of(first) is not None and shape_of(first) == shape_of(second)


def infer_shapes(graph: fx.GraphModule, only: Collection[fx.Node] | None = None) -> dict[fx.Node, Any]:
    """Meta tensors (shape and dtype) for every node at batch `BATCH`, sequence `SEQUENCE` (a decoder's own:
    `DECODER_SEQUENCE`).

    None for a value whose shape cannot be told, and for nodes outside `only` (say, the constant ones) where
    it is given.
    """
    analysis = _Analysis(graph, {"batch": BATCH, "length": SEQUENCE, "decoder_tokens": DECODER_SEQUENCE})
    analysis.only, analysis.lenient = only, True
    return {node: analysis.numbers(value) for node, value in analysis.propagate(_dynamic(graph)).items()}


def infer_symbols(graph: fx.GraphModule) -> dict[fx.Node, tuple[Symbols, torch.dtype]]:
    """Shape and type of the tensors of a graph.

    A size is a number, "batch", "length" (of tokens), the length of another input by its name
    ("decoder_tokens"), or None for what follows from these.
    """
    analysis = _Analysis(graph, {"batch": BATCH, "length": SEQUENCE, "decoder_tokens": DECODER_SEQUENCE})
    return analysis.symbols(analysis.propagate(_dynamic(graph)))


def infer_static(
    graph: fx.GraphModule, inputs: Mapping[str, Shape]
) -> dict[fx.Node, tuple[Shape, torch.dtype]]:
    """Shape and type of the tensors of a graph whose one dynamic size is the sequence length.

    A tensor with a size that is neither constant nor the length (twice the length, say) is left out.

    Args:
        inputs: for each placeholder, an int64 tensor's sizes, None for the sequence length.
    """
    analysis = _Analysis(graph, {"length": _FEW})
    given = [["length" if size is None else size for size in inputs[name]] for name in input_names(graph)]
    found = analysis.symbols(analysis.propagate(given))
    return {
        node: (tuple(None if size == "length" else int(size or 0) for size in sizes), dtype)
        for node, (sizes, dtype) in found.items()
        if None not in sizes
    }


def _dynamic(graph: fx.GraphModule) -> list[list[int | str]]:
    """[batch, length] of every input that `graphs.inputs` names."""
    require_known(graph)
    return [["batch", n if n == "decoder_tokens" else "length"] for n in input_names(graph)]


class _Known:
    """Symbols of given sizes, and what calls on tensors of such sizes give. One serves all graphs.

    Tensors that are alike are one object, by which calls are remembered.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        # Imported here, for they take more than a second.
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        # What depends on data has no shape here.
        shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.mode = FakeTensorMode(shape_env=shapes)
        self.sizes: dict[str, Any] = {
            name: shapes.create_symintnode(
                shapes.create_symbol(size, ConstantSource(name), DimDynamic.DYNAMIC), hint=size
            )
            for name, size in sizes.items()
        }
        self.names = {size.node.expr: name for name, size in self.sizes.items()}
        self.tensors: dict[Any, Tensor] = {}
        self.calls: dict[Any, Any] = {}
        self.numbers: dict[int, Tensor] = {}

    def serves(self) -> bool:
        """Whether no graph has fixed a size that is dynamic, or made one of two, and it is not too large."""
        own = {size.node.expr: name for name, size in self.sizes.items()}
        return own == self.names and len(self.calls) < _MOST


class _Kept(threading.local):
    """What each thread has found out so far, by the sizes of the symbols."""

    def __init__(self) -> None:
        self.by_sizes: dict[tuple[tuple[str, int], ...], _Known] = {}

    def of(self, sizes: Mapping[str, int]) -> _Known:
        key = tuple(sizes.items())
        if key not in self.by_sizes or not self.by_sizes[key].serves():
            self.by_sizes[key] = _Known(sizes)
        return self.by_sizes[key]


_kept = _Kept()


class _Analysis(fx.Interpreter):
    """Runs a graph on fake tensors.

    Attributes:
        only: the nodes to look at; the others become None.
        lenient: whether a value whose shape cannot be told becomes None too.
    """

    only: Collection[fx.Node] | None = None
    lenient = False

    def __init__(self, graph: fx.GraphModule, sizes: Mapping[str, int]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        known = _kept.of(sizes)
        self._mode, self._sizes, self._names = known.mode, known.sizes, known.names
        self._tensors, self._calls, self._numbers = known.tensors, known.calls, known.numbers

    def propagate(self, inputs: list[list[int | str]]) -> dict[fx.Node, Any]:
        """Every node with its fake value, given the sizes of the inputs, which are int64."""
        with self._mode, torch.no_grad():
            sizes = [[self._sizes.get(s, s) if isinstance(s, str) else s for s in one] for one in inputs]
            self.run(*(self._one(torch.empty(one, dtype=torch.int64)) for one in sizes))
        return dict(self.env)

    def numbers(self, value: Any) -> Any:
        """A value with the sizes that its symbols have, as a meta tensor."""
        if isinstance(value, (tuple, list)):
            return type(value)(map(self.numbers, value))
        if not isinstance(value, Tensor):
            return _number(value)
        if id(value) not in self._numbers:
            sizes = [_number(size) for size in value.shape]
            self._numbers[id(value)] = torch.empty(sizes, dtype=value.dtype, device="meta")
        return self._numbers[id(value)]

    def symbols(self, values: Mapping[fx.Node, Any]) -> dict[fx.Node, tuple[Symbols, torch.dtype]]:
        """The tensors among these, by the names of their symbols.

        Raises:
            GraphFormatError: they hold for one size alone of something that is dynamic.
        """
        fixed = [name for name, size in self._sizes.items() if size.node.expr.is_number]
        if fixed:
            raise GraphFormatError(
                f"expected a graph whose shapes hold for any {' and '.join(fixed)}, found one that computes "
                "with that number itself"
            )
        return {
            node: (tuple(self._symbol(size) for size in value.shape), value.dtype)
            for node, value in values.items()
            if isinstance(value, Tensor)
        }

    def _symbol(self, size: Any) -> int | str | None:
        return size if isinstance(size, int) else self._names.get(size.node.expr)

    def run_node(self, n: fx.Node) -> Any:
        if self.only is not None and n not in self.only:
            return None
        try:
            return super().run_node(n)
        except Exception:  # an operator without a shape rule, or fed by one: its value is unknown
            if self.lenient:
                return None
            raise

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = self.fetch_attr(target)
        if not isinstance(value, Tensor):
            return value
        key = (tuple(value.shape), value.stride(), value.dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.empty_strided(*key[:2], dtype=value.dtype)
        return self._tensors[key]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = (target, _key(args), _key(kwargs))
        if key not in self._calls:
            self._calls[key] = fx.node.map_aggregate(self._call(target, args, kwargs), self._one)
        return self._calls[key]

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.item.default and "batch" not in self._sizes:
            return 1  # the start position is data; any value gives the same sizes
        known = operator_of(target)
        if known is not None and known.result is not None:  # tracing what it is made of would take longer
            return known.result(*args, **kwargs)
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda a: _CPU if isinstance(a, torch.device) else a
        )
        return super().call_function(target, args, kwargs)

    def _one(self, value: Any) -> Any:
        """The one tensor that stands for all that are like this one."""
        if not isinstance(value, Tensor):
            return value
        key = (_key(tuple(value.shape)), _key(value.stride()), value.dtype)
        return self._tensors.setdefault(key, value)


def _number(value: Any) -> Any:
    """A size, or a comparison of sizes, as the symbols' own sizes make it."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def _key(value: Any) -> Any:
    """Equal for arguments that give the same shapes; tensors that are alike are one object."""
    if isinstance(value, Tensor):
        return id(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, Mapping):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return type(value), value
