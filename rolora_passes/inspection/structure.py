"""A graph in words, layer by layer: every site, and how its weights are stored."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.graph import is_op, op_name, root_names
from rolora_passes.graphs.layers import Layers, find_layers
from rolora_passes.graphs.operators import Trait, has, operator_of
from rolora_passes.graphs.shapes import infer_shapes

Row = tuple[str, str]


def structure_text(graph: fx.GraphModule) -> str:
    """The layers in order, with identical ones shown once; deterministic, and without any weight values.

    Every linear, embedding and attention has a row; the other operators are listed between them in execution
    order. `W` in a formula is the parameter that the row is named after.
    """
    layers, shapes = find_layers(graph), infer_shapes(graph)
    words = Words(layers, shapes)
    lines = []
    if layers.beside:
        lines += _rows(
            [("", "positions: " + _listed(words.phrase(n) for n in layers.beside if not is_view(n)))]
        )
    lines += _rows(words.rows(layers.before))
    lines += _layer_lines(words)
    lines += _rows(words.rows(layers.after))
    return "\n".join(lines) + "\n"


class Words:
    """Names and descriptions of nodes."""

    def __init__(self, layers: Layers, shapes: dict[fx.Node, Any]) -> None:
        self.layers = layers
        self.shapes = shapes
        self.modules = layers.modules

    def rows(self, nodes: list[fx.Node], inside: str = "") -> list[Row]:
        """A segment as (name, description), names relative to the module `inside`."""
        branches, hidden = self._branches(nodes)
        rows: list[Row] = []
        between: list[str] = []

        def flush() -> None:
            if between:
                rows.append(("", _listed(between)))
                between.clear()

        for node in nodes:
            if is_view(node) or node in hidden:
                continue
            text = _relative(self.phrase(node), inside)
            if node in branches:
                rows.append(branches[node])
            elif is_op(node, "linear", "embedding") and node in self.modules and self._weight(node):
                flush()
                rows.append((_relative(self.modules[node], inside), text))
            elif is_op(node, "attention"):
                flush()
                rows.append(("attention", text.removeprefix("attention ")))
            else:
                between.append(text)
        flush()
        return rows

    def phrase(self, node: fx.Node) -> str:
        """A node's operator, the parameters it reads, and the arguments that tell it from others."""
        known = operator_of(node)
        return self.plain(node) if known is None or known.words is None else known.words(self, node)

    def plain(self, node: Any, whole_numbers: bool = False) -> str:
        """An operator by its name, the parameters it reads (by formula), and its numbers and types."""
        words = [op_name(node)]
        for value in node.args:
            if value in self.layers.weights:
                shape = list(self.shape(value))
                words.append(formula(value, full=True) + (f" {shape}" if len(shape) > 1 else ""))
            elif isinstance(value, float) or (whole_numbers and isinstance(value, int)):
                words.append(f"{value:g}")
            elif isinstance(value, torch.dtype):
                words.append(str(value).removeprefix("torch."))
        return " ".join(words)

    def shape(self, value: Any) -> tuple[int, ...]:
        """The sizes of a value."""
        return tuple(self.shapes[value].shape)

    def size(self, value: Any) -> int | None:
        """The last of them; None where the shape is not known."""
        found = self.shapes.get(value)
        return int(found.shape[-1]) if isinstance(found, torch.Tensor) else None

    def weight(self, value: Any) -> str | None:
        """A weight's sizes, how it is stored and what it is made of; None of a value that is no weight."""
        if value not in self.layers.weights:
            return None
        made = formula(self.source(value))
        return f"{list(self.shape(value))} {self.stored(value)}" + ("" if made == "W" else f" = {made}")

    def stored(self, weight: fx.Node) -> str:
        """How a weight is stored: `float32`, `4 bits in groups of 32`."""
        if not has(weight, Trait.KEPT):
            return str(self.shapes[weight].dtype).removeprefix("torch.")
        return self.phrase(weight)

    def source(self, weight: Any) -> fx.Node:
        """The constant expression that a weight stores, on its grid or not."""
        source = weight.args[0] if has(weight, Trait.KEPT) else weight
        found: fx.Node = source.args[0] if has(source, Trait.QUANTIZES) else source
        return found

    def _weight(self, node: Any) -> fx.Node | None:
        weight = node.args[1] if is_op(node, "linear") else node.args[0]
        return weight if weight in self.layers.weights else None

    def _branches(self, nodes: list[fx.Node]) -> tuple[dict[fx.Node, Row], set[fx.Node]]:
        """Rows for low-rank branches, by their second linears, and the other nodes these account for."""
        found, hidden = {}, set()
        for high in nodes:
            low: Any = high.args[0] if high.args else None
            if not (
                is_op(high, "linear") and is_op(low, "linear") and self._weight(high) and self._weight(low)
            ):
                continue
            what = f"rank {self.size(low)}"
            hidden.add(low)
            scaled, *more = high.users
            if not more and is_op(scaled, "mul") and isinstance(scaled.args[1], (int, float)):
                what += f", x {scaled.args[1]:g}"
                hidden |= {scaled, *(u for u in scaled.users if is_op(u, "add"))}
            found[high] = "  + " + ", ".join(self.modules[n].rpartition(".")[2] for n in (low, high)), what
        return found, hidden


def formula(node: fx.Node, full: bool = False) -> str:
    """A constant expression in words, its subject as `W` (or by its whole name)."""
    subject = root_names(node)[0]

    def show(value: Any) -> str:
        if not isinstance(value, fx.Node):
            return f"{value:g}" if isinstance(value, float) else str(value).removeprefix("torch.")
        if value.op == "get_attr":
            return "W" if value.target == subject and not full else parameter_name(str(value.target))
        name, words, known = op_name(value), [show(a) for a in value.args], operator_of(value)
        if known is not None and known.sign:
            return f"({words[0]} {known.sign} {words[1]})"
        return f"{name}({', '.join(map(_bare, words[: known.shown if known else None]))})"

    return _bare(show(node))


def _bare(text: str) -> str:
    """Without the brackets around all of it (`(a * b)`, not `(a * b) + (c * d)`, which has its own)."""
    return text[1:-1] if text.startswith("(") else text


def parameter_name(name: str) -> str:
    """A rotation by its key alone; any other parameter by name."""
    key = re.search(r"(?:^|[._])(R\d+)$", name) if name.startswith("rotations.") else None
    return key[1] if key else name


def is_view(node: fx.Node) -> bool:
    """Whether a node moves elements without changing them."""
    moves = has(node, Trait.VIEW | Trait.COPY) or is_op(node, "getitem")
    return moves and len(node.all_input_nodes) < 2


def _layer_lines(words: Words) -> list[str]:
    """Every kind of layer once, with the numbers of those that are of it."""
    kinds: dict[tuple[Row, ...], list[int]] = {}
    prefixes: list[str] = []
    for number, nodes in enumerate(words.layers.layers):
        prefixes.append(words.layers.module_of(nodes))
        rows = words.rows(nodes, prefixes[-1])
        kinds.setdefault(tuple(rows), []).append(number)
    lines: list[str] = []
    first = list(next(iter(kinds), ()))
    for known, numbers in kinds.items():
        rows = list(known)
        title = f"layers {spans(numbers)} (x{len(numbers)})" if len(numbers) > 1 else f"layer {numbers[0]}"
        if prefixes[numbers[0]]:
            title += f", {numberless(prefixes[numbers[0]])}"
        if lines and len(rows) == len(first):
            different = [new for new, old in zip(rows, first, strict=True) if new != old]
            lines += [f"{title}: as layer 0, but", *_rows(different, "  ")]
        else:
            lines += [title + ":", *_rows(rows, "  ")]
    return lines


def _rows(rows: list[Row], indent: str = "") -> list[str]:
    width = max((len(name) for name, _ in rows if name), default=0)
    lines = []
    for name, what in rows:
        text = f"{indent}{name:{width}}  {what}" if name else indent + what
        lines += textwrap.wrap(text, 110, subsequent_indent=indent + "    ", break_on_hyphens=False)
    return lines


def spans(numbers: Iterable[int]) -> str:
    """Sorted numbers in spans (`0-3, 5, 7`), evenly spaced ones by their ends (`0, 2, … 24`)."""
    numbers = list(numbers)
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, … {numbers[-1]}"
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in found)


def numberless(text: str) -> str:
    """Text with `*` for every number that is a part of a dotted name; other numbers stay."""
    return re.sub(r"(?<=[A-Za-z_]\.)\d+\b", "*", text)


def _relative(text: str, module: str) -> str:
    return text.replace(module + ".", "") if module else text


def _listed(items: Iterable[str]) -> str:
    """Items in order, with a number where one, or all of them in turn, are repeated."""
    items = list(items)
    for period in range(1, len(items)):
        times = len(items) // period
        if items == items[:period] * times:
            return ", ".join(f"{item} x{times}" for item in items[:period])
    runs = [(item, len(list(run))) for item, run in groupby(items)]
    return ", ".join(item if n == 1 else f"{item} x{n}" for item, n in runs)
