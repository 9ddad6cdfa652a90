"""A graph in words, layer by layer: every site, and how its weights are stored."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.graph import KEPT, argument, is_op, op_name, root_names
from rolora_passes.graphs.layers import Layers, find_layers
from rolora_passes.graphs.shapes import infer_shapes

# What moves elements without changing them says little about a layer.
VIEWS = {
    "unflatten", "flatten", "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand",
    "getitem", "contiguous", "clone",
}  # fmt: skip

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
        name = op_name(node)
        if is_op(node, "linear", "embedding") and (weight := self._weight(node)) is not None:
            kind = "" if name == "linear" else name + " "
            bias = ", bias" if name == "linear" and argument(node, "bias") is not None else ""
            how, text = self.stored(weight), formula(self.source(weight))
            made = "" if text == "W" else f" = {text}"
            return f"{kind}{list(self.shapes[weight].shape)} {how}{made}{bias}"
        if name == "attention":
            return self._attention(node)
        if name == "hadamard":
            order, width = node.args[1], self._size(node.args[0])
            return f"hadamard {order}" + (f" of {width}" if width not in (order, None) else "")
        if name == "kronecker":
            sizes = " x ".join(str(self._size(factor)) for factor in argument(node, "factors"))
            return f"kronecker {sizes} of {self._size(node.args[0])}"
        if name in ("fake_quantize", "fake_quantize_static"):
            return self._fake_quantize(node)
        if name == "rotary_embedding":
            width, turned = self._size(node.args[0]), self._size(node.args[1])
            return name + (f" of {turned} of {width} channels" if turned != width else "")
        return " ".join([name, *self._operands(node)])

    def stored(self, weight: fx.Node) -> str:
        """How a weight is stored: `float32`, `4 bits in groups of 32`."""
        if not is_op(weight, *KEPT):
            return str(self.shapes[weight].dtype).removeprefix("torch.")
        width, groups = (self.shapes[n].shape[-1] for n in weight.args[:2])
        how = f"{argument(weight, 'bits')} bits " + (
            "a row" if groups == 1 else f"in groups of {width // groups}"
        )
        if is_op(weight, "decode"):
            return f"{how} of {weight.args[2].target}"
        return how if weight.args[2] is None else f"{how}, zero points"

    def source(self, weight: Any) -> fx.Node:
        """The constant expression that a weight stores, on its grid or not."""
        source = weight.args[0] if is_op(weight, *KEPT) else weight
        found: fx.Node = source.args[0] if is_op(source, "quantize", "encode") else source
        return found

    def _attention(self, node: Any) -> str:
        query, key, value = (self.shapes[a].shape for a in node.args[:3])
        heads = f"{query[2]} heads x {query[3]}"
        if key[2:] != query[2:] or value[2:] != query[2:]:
            width = f"{key[3]}" if key[3] == value[3] else f"{key[3]}, {value[3]}"
            heads += f", keys and values {key[2]} x {width}"
        known: dict[str, Any] = {name: argument(node, name) for name in ("window", "softcap", "scale")}
        extra = [f"{name} {value:.6g}" for name, value in known.items() if value is not None]
        return ", ".join(
            [f"attention {heads}", "causal" if argument(node, "causal") else "not causal", *extra]
        )

    def _fake_quantize(self, node: Any) -> str:
        words = [f"fake_quantize {argument(node, 'bits')} bits"]
        if is_op(node, "fake_quantize_static"):
            words.append("static")
        elif (group := argument(node, "group_size")) is not None:
            words.append(f"in groups of {group}")
        else:
            words.append("a token" if self.shapes[node].dim() < 4 else "a head")
        if argument(node, "symmetric"):
            words.append("symmetric")
        if argument(node, "clip", 1.0) != 1.0:
            words.append(f"clip {argument(node, 'clip'):g}")
        return " ".join(words)

    def _operands(self, node: Any) -> list[str]:
        """Parameters that a node reads, by formula, and its literal numbers and types."""
        words = []
        for value in node.args:
            if value in self.layers.weights:
                shape = list(self.shapes[value].shape)
                words.append(formula(value, full=True) + (f" {shape}" if len(shape) > 1 else ""))
            elif isinstance(value, float) or (isinstance(value, int) and is_op(node, *_ARITHMETIC)):
                words.append(f"{value:g}")
            elif isinstance(value, torch.dtype):
                words.append(str(value).removeprefix("torch."))
        return words if not is_op(node, "rms_norm", "layer_norm") else []

    def _weight(self, node: Any) -> fx.Node | None:
        weight = node.args[1] if is_op(node, "linear") else node.args[0]
        return weight if weight in self.layers.weights else None

    def _size(self, value: Any) -> int | None:
        found = self.shapes.get(value)
        return int(found.shape[-1]) if isinstance(found, torch.Tensor) else None

    def _branches(self, nodes: list[fx.Node]) -> tuple[dict[fx.Node, Row], set[fx.Node]]:
        """Rows for low-rank branches, by their second linears, and the other nodes these account for."""
        found, hidden = {}, set()
        for high in nodes:
            low: Any = high.args[0] if high.args else None
            if not (
                is_op(high, "linear") and is_op(low, "linear") and self._weight(high) and self._weight(low)
            ):
                continue
            what = f"rank {self._size(low)}"
            hidden.add(low)
            scaled, *more = high.users
            if not more and is_op(scaled, "mul") and isinstance(scaled.args[1], (int, float)):
                what += f", x {scaled.args[1]:g}"
                hidden |= {scaled, *(u for u in scaled.users if is_op(u, "add"))}
            found[high] = "  + " + ", ".join(self.modules[n].rpartition(".")[2] for n in (low, high)), what
        return found, hidden


_ARITHMETIC = ("mul", "div", "add", "sub", "pow")


def formula(node: fx.Node, full: bool = False) -> str:
    """A constant expression in words, its subject as `W` (or by its whole name)."""
    subject = root_names(node)[0]

    def show(value: Any) -> str:
        if not isinstance(value, fx.Node):
            return f"{value:g}" if isinstance(value, float) else str(value).removeprefix("torch.")
        if value.op == "get_attr":
            return "W" if value.target == subject and not full else parameter_name(str(value.target))
        name, known = op_name(value), [show(a) for a in value.args]
        if name in ("mul", "add", "sub", "div", "matmul"):
            sign = {"mul": "*", "add": "+", "sub": "-", "div": "/", "matmul": "@"}[name]
            return f"({known[0]} {sign} {known[1]})"
        kept = 2 if name in ("rotate", "hadamard", "kronecker") else len(known)
        return f"{name}({', '.join(map(_bare, known[:kept]))})"

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
    return op_name(node) in VIEWS and len(node.all_input_nodes) < 2


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
