"""The differences between two graphs in words: nodes, weights, facts; identical layers count once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.accounting import weigh
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.facts import facts
from rolora_passes.graphs.graph import get_tensor, is_op, op_name, parameters, root_names, upstream
from rolora_passes.graphs.info import info
from rolora_passes.graphs.layers import find_layers
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.inspection.structure import Words, formula, is_view, numberless, parameter_name

_SHOWN = 24  # lines per section; identical ones count once


def diff_text(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """What changed from one graph to another, or "no difference".

    Nodes correspond if they have the same name and operator in both graphs, which holds before and after a
    pass, and between two captures of one architecture. The change of a weight is relative to its Frobenius
    norm, as linears read it: with expressions evaluated and quantized weights dequantized.
    """
    diff = _Diff(before, after)
    sections = {
        "facts": _changes(facts(before), facts(after)),
        "size": _sizes(before, after),
        "nodes": diff.nodes(),
        "weights": diff.weights(),
        "parameters": _parameters(before, after),
        "rotations": _changes(_rotations(before), _rotations(after)),
        "config": _changes(_config(before), _config(after)),
    }
    lines = []
    for name, found in sections.items():
        if found:
            lines += [f"{name}:", *(f"  {line}" for line in _few(found))]
    return "\n".join(lines or ["no difference"]) + "\n"


class _Diff:
    """Two graphs, and the nodes that they share."""

    def __init__(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        self.before, self.after = _Side(before), _Side(after)
        old, new = ({n.name: n for n in side.nodes} for side in (self.before, self.after))
        self.shared = {
            name: (old[name], new[name])
            for name in old
            if name in new and op_name(old[name]) == op_name(new[name])
        }

    def nodes(self) -> list[str]:
        """Nodes that only one graph has, and shared nodes whose arguments or inputs changed."""
        gone = [f"- {self.before.place(n)}" for n in self.before.nodes if n.name not in self.shared]
        new = [f"+ {self.after.place(n)}" for n in self.after.nodes if n.name not in self.shared]
        changed = []
        for old, now in self.shared.values():
            was, is_ = literals(old), literals(now)
            for name in dict.fromkeys([*was, *is_]):
                if was.get(name) != is_.get(name):
                    changed.append(f"~ {self.after.label(now)}: {name} {was.get(name)} -> {is_.get(name)}")
            before, after = self.before.reads(old, self.shared), self.after.reads(now, self.shared)
            if before != after:
                changed.append(
                    f"~ {self.after.label(now)}: reads {', '.join(after)}, not {', '.join(before)}"
                )
        return _folded([*gone, *new, *changed])

    def weights(self) -> list[str]:
        """Constant operands of shared nodes, sorted by how far their values moved."""
        found: dict[str, list[float]] = {}
        for old, now in self.shared.values():
            for a, b in zip(_operands(old), _operands(now), strict=False):
                known = a in self.before.weights and b in self.after.weights
                change = self._change(a, b) if known else None
                if change is not None:
                    was, is_ = self.before.how(old, a), self.after.how(now, b)
                    how = ", ".join(f"{x} -> {y}" for x, y in zip(was, is_, strict=True) if x != y)
                    name = numberless(root_names(a)[0])
                    found.setdefault(f"{name}: {how}" if how else name, []).append(change)
        order = sorted(found.items(), key=lambda item: (-round(max(item[1]), 3), item[0]))
        return [f"{_span(changes):14}  {how}{_times(len(changes))}" for how, changes in order]

    def _change(self, old: Any, new: Any) -> float | None:
        """|b - a| / |a|, or None if values and formulas are the same."""
        sides = (self.before, old), (self.after, new)
        written = [(side.words.stored(n), formula(side.words.source(n), full=True)) for side, n in sides]
        same = written[0] == written[1]
        if same and _tensors(self.before.graph, old) == _tensors(self.after.graph, new):
            return None
        ((a,), (b,)) = (compute(side.graph, [n]) for side, n in sides)
        if a.shape != b.shape:
            return float("inf")
        if same and torch.equal(a, b):
            return None
        a, b = a.double(), b.double()
        return float((b - a).norm() / a.norm().clamp_min(torch.finfo(torch.float64).tiny))


class _Side:
    """One of the two graphs, with names for its nodes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph, self.layers = graph, find_layers(graph)
        self.weights = self.layers.weights
        self.words = Words(self.layers, infer_shapes(graph))
        segments = self.layers.segments
        self.inside = {n: numberless(self.layers.module_of(nodes)) for nodes in segments for n in nodes}
        self.nodes = [n for nodes in segments for n in nodes if not is_view(n)]

    def label(self, node: fx.Node) -> str:
        """A linear's site; any other node's operator and module."""
        module = numberless(self.words.modules[node])
        return module if is_op(node, "linear") and module else f"{op_name(node)} in {module or 'the model'}"

    def place(self, node: fx.Node) -> str:
        """A node in words, with its place: its site, or what reads it."""
        text = numberless(self.words.phrase(node))
        if is_op(node, "linear"):
            return f"linear {self.label(node)} {text}"
        readers = list(dict.fromkeys(self._readers(node)))
        return f"{text}, read by {_together(readers)}" if readers else text

    def _readers(self, node: fx.Node) -> Iterable[str]:
        for user in node.users:
            if user.op == "output":
                yield "the output"
            elif is_view(user):
                yield from self._readers(user)
            elif user in self.words.modules:
                yield self.label(user)

    def reads(self, node: fx.Node, shared: Mapping[str, Any]) -> list[str]:
        """The values that a node reads, looking through views and nodes that the other graph lacks."""
        return [self._source(a, shared) for a in node.all_input_nodes if a not in self.weights]

    def _source(self, value: fx.Node, shared: Mapping[str, Any]) -> str:
        inputs = [a for a in value.all_input_nodes if a not in self.weights]
        if inputs and (is_view(value) or value.name not in shared):
            return self._source(inputs[0], shared)
        return value.name

    def how(self, reader: fx.Node, weight: fx.Node) -> tuple[str, str]:
        """How a weight is stored, and its formula, with names relative to its reader's layer."""
        text = numberless(formula(self.words.source(weight)))
        return self.words.stored(weight), text.replace(self.inside[reader] + ".", "")


def _operands(node: fx.Node) -> list[Any]:
    return list(node.args)


def literals(node: Any) -> dict[str, Any]:
    """A node's literal arguments, by name."""
    names = [a.name for a in node.target._schema.arguments] if hasattr(node.target, "_schema") else []
    named = dict(zip(names, node.args, strict=False)) | node.kwargs
    return {k: v for k, v in named.items() if isinstance(v, (int, float, str, torch.dtype, type(None)))}


def _tensors(graph: fx.GraphModule, node: fx.Node) -> list[tuple[Any, ...]]:
    """The identity of the tensors in an expression; their data is not read."""
    names = sorted(str(n.target) for n in upstream([node]) if n.op == "get_attr")
    found = [get_tensor(graph, name) for name in names]
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in found]


def _span(values: list[float]) -> str:
    low, high = (f"{v:.3f}" if v < float("inf") else "another shape" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _together(names: list[str]) -> str:
    """Sites of one module, with its name written once: `self_attn.{q_proj, k_proj}`."""
    modules = {name.rpartition(".")[0] for name in names}
    if len(names) < 2 or len(modules) > 1 or " " in "".join(names):
        return ", ".join(names)
    return f"{modules.pop()}.{{{', '.join(name.rpartition('.')[2] for name in names)}}}"


def _changes(before: Iterable[str], after: Iterable[str]) -> list[str]:
    """Lines that only one side has."""
    old, new = list(before), list(after)
    return _folded([*(f"- {x}" for x in old if x not in new), *(f"+ {x}" for x in new if x not in old)])


def _folded(lines: Iterable[str]) -> list[str]:
    """Lines with layer numbers removed, and a count of equal ones."""
    counts: dict[str, int] = {}
    for line in lines:
        counts[numberless(line)] = counts.get(numberless(line), 0) + 1
    return [line + _times(n) for line, n in counts.items()]


def _times(n: int) -> str:
    return f"  x{n}" if n > 1 else ""


def _few(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]


def _sizes(before: fx.GraphModule, after: fx.GraphModule) -> list[str]:
    texts = [
        f"{w.elements:,} weights, {w.megabytes:.2f} MB, {w.bits_per_weight:.2f} bits each"
        for w in map(weigh, (before, after))
    ]
    return [] if texts[0] == texts[1] else [f"{texts[0]} -> {texts[1]}"]


def _parameters(before: fx.GraphModule, after: fx.GraphModule) -> list[str]:
    """Parameters that only one graph has, counted by the last part of their names and their dtype."""
    old, new = parameters(before), parameters(after)
    kinds: dict[str, int] = {}
    for sign, mine, other in (("-", old, new), ("+", new, old)):
        for name, value in mine.items():
            if name not in other or (value.shape, value.dtype) != (other[name].shape, other[name].dtype):
                leaf = parameter_name(name).rpartition(".")[2]
                kind = f"{sign} {leaf} {str(value.dtype).removeprefix('torch.')}"
                kinds[kind] = kinds.get(kind, 0) + 1
    return [kind + _times(n) for kind, n in kinds.items()]


def _rotations(graph: fx.GraphModule) -> list[str]:
    return [f"{key} ({r.size}, {r.method})" for key, r in info(graph).rotations.items()]


def _config(graph: fx.GraphModule) -> list[str]:
    return [f"{key} {value}" for key, value in info(graph).config.items()]
