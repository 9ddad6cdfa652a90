"""Maps of one axis of a weight, and a low-rank branch carried over them, or back.

Every exact pass writes W' = L W R, L and R each a sequence of such maps: a gain, a rotation, a Hadamard, a
slice of a fused projection. A branch B·A beside W becomes (L B)·(A R).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rolora_passes.errors import PassError
from rolora_passes.graphs.ops import rotate
from rolora_passes.numerics import hadamard


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
        tensors: names in the graph's `way_tensors` (`name_of`).
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
        transposed: whether the parameter is [in, out], as GPT-2's are, and not folded yet.
    """

    root: str
    steps: tuple[Step, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    reason: str | None = None
    transposed: bool = False

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
