"""What passes did to the axes of a linear's weight, so that a low-rank branch can be taken along, or back.

Every exact pass writes W' = L W R, L and R each a sequence of simple maps of one axis: a gain, a rotation, a
Hadamard, a slice of a fused projection. A branch B·A beside W becomes (L B)·(A R). Until fold-constants the
maps are the expression on W itself; it keeps them in the graph's metadata, as the weight's *way*.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs import hadamard
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import argument, constants, is_op, linears, op_name, root_names
from rolora_passes.graphs.ops import rotate
from rolora_passes.graphs.shapes import infer_shapes

# What leaves every axis as it is.
_STILL = ("dequantize", "decode", "quantize", "encode", "to")


@dataclass(frozen=True)
class Step:
    """A map of one axis of a weight.

    Attributes:
        kind: "mul", "div", "rotate", "hadamard", "kronecker", "centre", "slice", "unflatten", "flatten";
            "shift": the linear's input has had `tensors[0]` added, which its bias holds since; "changed": a
            matrix was added to the weight.
        side: "in" or "out".
        place: which of the side's axes, for a fused projection may be unflattened.
        numbers: as the kind has them: [inner] of rotate; [order, inner]; [start, end, size] of slice; sizes.
        tensors: names in the graph's `way_tensors`.
    """

    kind: str
    side: str
    place: int = 0
    numbers: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()


CHANGED = Step("changed", "in")


@dataclass(frozen=True)
class Way:
    """From a parameter of the model to a linear's weight.

    Attributes:
        root: the parameter's name in the model.
        steps: in the order they were done.
        tensors: what the steps name.
        reason: why there is none, if an operator on the weight is no map of one axis.
    """

    root: str
    steps: tuple[Step, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    reason: str | None = None

    @property
    def changed(self) -> bool:
        """Whether the weight is another matrix than the model's, in whatever basis."""
        return CHANGED in self.steps

    def then(self, step: Step) -> Way:
        """The same way and one step more."""
        return dataclasses.replace(self, steps=(*self.steps, step))

    def root_shape(self, shape: Sequence[int]) -> list[int]:
        """[out, in] of the parameter, given the weight's: a fused projection is larger than its parts."""
        sizes = {"out": shape[0], "in": shape[1]}
        for step in reversed(self.steps):
            if step.kind == "slice":
                start, end, size = step.numbers
                sizes[step.side] = sizes[step.side] // (end - start) * size
        return [sizes["out"], sizes["in"]]

    @property
    def module(self) -> str:
        """The module whose weight it was, as PEFT names it."""
        return self.root.removesuffix(".weight")


@dataclass(frozen=True)
class LowRank:
    """A branch y += scale · (B (A x + a) + b).

    Attributes:
        a: [rank, in].
        b: [out, rank].
        scale: of all of it.
        inner, outer: a [rank] and b [out], or None.
    """

    a: Tensor
    b: Tensor
    scale: float
    inner: Tensor | None = None
    outer: Tensor | None = None

    def to(self, dtype: torch.dtype) -> LowRank:
        """In another type."""
        a, b, inner, outer = (
            None if t is None else t.to(dtype) for t in (self.a, self.b, self.inner, self.outer)
        )
        assert a is not None and b is not None
        return LowRank(a, b, self.scale, inner, outer)


def forth(way: Way, branch: LowRank) -> LowRank:
    """A branch beside the model's weight as it stands beside the graph's; in the branch's type."""
    a, b, inner, outer = branch.a, branch.b, branch.inner, branch.outer
    for step in way.steps:
        known = [way.tensors[name].to(a.dtype) for name in step.tensors]
        if step.kind == "shift":
            moved = a @ known[0]
            inner = moved if inner is None else inner + moved
        elif step.side == "in":
            a = _FORTH[step.kind](a, step.place + 1, step.numbers, known)
        else:
            b = _FORTH[step.kind](b, step.place, step.numbers, known)
            outer = None if outer is None else _FORTH[step.kind](outer, step.place, step.numbers, known)
    return LowRank(a, b, branch.scale, inner, outer)


def back(way: Way, branch: LowRank) -> LowRank:
    """A branch beside the graph's weight as it stands beside the model's, where it needs no inner bias.

    The part of a fused projection comes back beside all of it, zero elsewhere.

    Raises:
        PassError: a gain of zero was multiplied in, which nothing undoes.
    """
    a, b, inner, outer = branch.a, branch.b, branch.inner, branch.outer
    for step in reversed(way.steps):
        known = [way.tensors[name].to(a.dtype) for name in step.tensors]
        if step.kind == "shift":
            moved = a @ known[0]
            inner = -moved if inner is None else inner - moved
        elif step.side == "in":
            a = _BACK[step.kind](a, step.place + 1, step.numbers, known)
        else:
            b = _BACK[step.kind](b, step.place, step.numbers, known)
            outer = None if outer is None else _BACK[step.kind](outer, step.place, step.numbers, known)
    if inner is not None and float(inner.abs().max()) > _ROUNDING * float(a.abs().max()):
        pushed = b @ inner
        outer = pushed if outer is None else outer + pushed
    return LowRank(a, b, branch.scale, None, outer)


_ROUNDING = 1e-12
_Map = Callable[[Tensor, int, tuple[int, ...], list[Tensor]], Tensor]


def _along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    return vector.reshape([-1] + [1] * (x.dim() - dim - 1))


def _divided(x: Tensor, dim: int, vector: Tensor) -> Tensor:
    if not bool((vector != 0).all()):
        raise PassError("an adapter cannot be carried back over a gain of zero, which a pass multiplied in")
    return x / _along(vector, x, dim)


def _turned_back(x: Tensor, dim: int, inner: int, rotation: Tensor) -> Tensor:
    if rotation.dim() == 2:
        return rotate(x, rotation.T, dim, inner)
    order = hadamard.largest_order(len(rotation))
    signs = rotation.repeat_interleave(inner).repeat(x.shape[dim] // (len(rotation) * inner))
    return _hadamard_back(x, dim, order, inner) * _along(signs, x, dim)


def _hadamard_back(x: Tensor, dim: int, order: int, inner: int) -> Tensor:
    """Times the transpose, by its Kronecker factors."""
    factors = [m.T.to(x.dtype) / len(m) ** 0.5 for m in hadamard.factors(order)]
    if inner == 1:
        return hadamard.multiply(x, factors, dim)
    split = x.unflatten(dim, (-1, order, inner)).movedim(dim + 2, dim)
    return hadamard.multiply(split, factors, dim + 2).movedim(dim, dim + 2).flatten(dim, dim + 2)


def _embedded(x: Tensor, dim: int, start: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    whole = x.new_zeros(shape)
    whole.narrow(dim, start, x.shape[dim]).copy_(x)
    return whole


_FORTH: dict[str, _Map] = {
    "mul": lambda x, dim, n, t: x * _along(t[0], x, dim),
    "div": lambda x, dim, n, t: x / _along(t[0], x, dim),
    "rotate": lambda x, dim, n, t: rotate(x, t[0], dim, n[0]),
    "hadamard": lambda x, dim, n, t: hadamard.transform(x, n[0], dim, n[1]),
    "kronecker": lambda x, dim, n, t: hadamard.multiply(x, t, dim),
    "centre": lambda x, dim, n, t: x - x.mean(dim, keepdim=True),
    "slice": lambda x, dim, n, t: x.narrow(dim, n[0], n[1] - n[0]),
    "unflatten": lambda x, dim, n, t: x.unflatten(dim, n),
    "flatten": lambda x, dim, n, t: x.flatten(dim, dim + len(n) - 1),
    "changed": lambda x, dim, n, t: x,
}
_BACK: dict[str, _Map] = {
    "mul": lambda x, dim, n, t: _divided(x, dim, t[0]),
    "div": lambda x, dim, n, t: x * _along(t[0], x, dim),
    "rotate": lambda x, dim, n, t: _turned_back(x, dim, n[0], t[0]),
    "hadamard": lambda x, dim, n, t: _hadamard_back(x, dim, n[0], n[1]),
    "kronecker": lambda x, dim, n, t: hadamard.multiply(x, [m.T for m in t], dim),
    "centre": lambda x, dim, n, t: x,  # what reads it cannot tell
    "slice": lambda x, dim, n, t: _embedded(x, dim, n[0], n[2]),
    "unflatten": lambda x, dim, n, t: x.flatten(dim, dim + len(n) - 1),
    "flatten": lambda x, dim, n, t: x.unflatten(dim, n),
    "changed": lambda x, dim, n, t: x,
}


# Finding the way of a weight.


def ways(graph: fx.GraphModule) -> dict[fx.Node, Way]:
    """The way of every linear's weight: what is kept of folded expressions, then the expression there is.

    A weight that something else than maps of one axis was done to has a `reason` in place of steps.
    """
    reader = _Reader(graph)
    return {node: reader.way(node) for node in linears(graph)}


def keep_ways(graph: fx.GraphModule, known: Mapping[fx.Node, Way]) -> None:
    """Keep the ways of linears, which `ways` found, under the names of the parameters they now read."""
    for linear, way in known.items():
        name = root_names(linear.args[1])[0]
        if way.steps or way.reason or name != way.root:
            steps = [plain(step) for step in way.steps]
            graph.meta.setdefault("ways", {})[name] = {"root": way.root, "steps": steps, "reason": way.reason}
            graph.meta.setdefault("way_tensors", {}).update(way.tensors)


def plain(step: Step) -> list[Any]:
    """A step as JSON has it."""
    return [step.kind, step.side, step.place, list(step.numbers), list(step.tensors)]


def _step(plain: list[Any]) -> Step:
    kind, side, place, numbers, tensors = plain
    return Step(kind, side, place, tuple(numbers), tuple(tensors))


class _Reader:
    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.kept: dict[str, Any] = graph.meta.get("ways", {})
        self.tensors: dict[str, Tensor] = dict(graph.meta.get("way_tensors", {}))
        self.shapes = infer_shapes(graph, only=constants(graph))

    def way(self, linear: fx.Node) -> Way:
        try:
            return self._way(linear)
        except _NoMap as found:
            root = root_names(linear.args[1])[0]
            return Way(self.kept.get(root, {}).get("root", root), (), {}, str(found))

    def _way(self, linear: fx.Node) -> Way:
        chain: list[fx.Node] = []
        node: Any = linear.args[1]
        while node.op != "get_attr":
            chain.append(node)
            node = node.args[0]
        kept = self.kept.get(str(node.target), {"root": str(node.target), "steps": [], "reason": None})
        if kept["reason"]:
            raise _NoMap(kept["reason"])
        found: list[Step] = []  # from the weight back to its parameter
        sides = ["out", "in"]
        shift = self._shift(linear)
        for op in chain:
            found += self._pushed(shift, op)
            found += self._steps(op, sides)
        found += self._pushed(shift, node)
        steps = (*map(_step, kept["steps"]), *reversed(found))
        names = {name for step in steps for name in step.tensors}
        return Way(kept["root"], steps, {name: self.tensors[name] for name in names})

    def _steps(self, node: Any, sides: list[str]) -> list[Step]:
        """The map that a node is, and `sides` as they are of its operand."""
        name, source = op_name(node), node.args[0]
        dims = self.shapes[source].dim() if not is_op(node, *_STILL) else 2
        if name in _STILL:
            return []
        if name in ("t", "transpose"):
            sides.reverse()
            return []
        if name in ("rotate", "hadamard", "kronecker", "slice", "unflatten"):
            dim = argument(node, "dim", -1 if name != "slice" else 0) % dims
        if name == "rotate":
            key = self._tensor(node.args[1])
            return [self._at(sides, dim, name, (argument(node, "inner", 1),), (key,))]
        if name == "hadamard":
            return [self._at(sides, dim, name, (node.args[1], argument(node, "inner", 1)))]
        if name == "kronecker":
            return [self._at(sides, dim, name, (), tuple(self._tensor(f) for f in node.args[1]))]
        if name in ("mul", "div"):
            return self._gain(node, sides)
        if name == "sub" and is_op(node.args[1], "mean") and node.args[1].args[0] is source:
            return [self._at(sides, node.args[1].args[1][0] % dims, "centre")]
        if name in ("add", "sub"):
            return [CHANGED]
        if name == "slice":
            size = self.shapes[source].shape[dim]
            if argument(node, "step", 1) != 1:
                raise _NoMap(f"{node.format_node()} takes every other of a weight's channels")
            start, end, _ = slice(argument(node, "start"), argument(node, "end")).indices(size)
            return [self._at(sides, dim, name, (start, end, size))]
        if name == "unflatten":
            sizes = tuple(self.shapes[node].shape[dim : dim + len(node.args[2])])
            step = self._at(sides, dim, name, sizes)
            del sides[dim + 1 : dim + len(sizes)]
            return [step]
        if name == "flatten":
            first, last = (d % dims for d in (argument(node, "start_dim", 0), argument(node, "end_dim", -1)))
            sides[first : first + 1] = [sides[first]] * (last - first + 1)
            return [self._at(sides, first, name, tuple(self.shapes[source].shape[first : last + 1]))]
        raise _NoMap(f"{node.format_node()} is no map of one axis of a weight")

    def _at(self, sides: list[str], dim: int, kind: str, numbers: Any = (), tensors: Any = ()) -> Step:
        side = sides[dim]
        return Step(kind, side, sides[:dim].count(side), tuple(numbers), tuple(tensors))

    def _gain(self, node: Any, sides: list[str]) -> list[Step]:
        other = node.args[1]
        if not isinstance(other, fx.Node):
            raise _NoMap(f"{node.format_node()} multiplies a weight by a number")
        shape = list(self.shapes[other].shape)
        shape = [1] * (len(sides) - len(shape)) + shape
        wide = [d for d, size in enumerate(shape) if size > 1] or [len(shape) - 1]
        if len(wide) > 1:
            raise _NoMap(f"{node.format_node()} multiplies a weight by a matrix, element by element")
        (dim,) = wide
        return [self._at(sides, dim, op_name(node), (), (self._tensor(other),))]

    def _tensor(self, node: fx.Node) -> str:
        """A name under which the value of an expression is kept."""
        name = _label(node)
        if name not in self.tensors:
            (self.tensors[name],) = compute(self.graph, [node], dtype=torch.float64)
        return name

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
        return [Step("shift", "in", 0, (), (self._tensor(shift[1]),))]


def _label(value: Any) -> str:
    """An expression as text, which names its value."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op == "get_attr":
        return str(value.target)
    return f"{op_name(value)}({', '.join(map(_label, value.args))})"


class _NoMap(Exception):
    """An operator on a weight that no adapter can be carried over."""
