"""Maps of one axis of a weight, and a low-rank branch carried over them, or back.

Every exact pass writes W' = L W R, L and R each a sequence of such maps: a gain, a rotation, a Hadamard, a
slice of a fused projection. A branch B·A beside W becomes (L B)·(A R).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rolora_passes.graphs.operators.registry import axis_map
from rolora_passes.graphs.operators.steps import CHANGED as CHANGED
from rolora_passes.graphs.operators.steps import Step as Step


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


_ROUNDING = 1e-12


def forth(way: Way, branch: LowRank) -> LowRank:
    """A branch beside the model's weight as it stands beside the graph's; in the branch's type."""
    for step in way.steps:
        branch = _carried(way, step, branch, undo=False)
    return branch


def back(way: Way, branch: LowRank) -> LowRank:
    """A branch beside the graph's weight as it stands beside the model's, where it needs no inner bias.

    The part of a fused projection comes back beside all of it, zero elsewhere.

    Raises:
        PassError: a gain of zero was multiplied in, which nothing undoes.
    """
    for step in reversed(way.steps):
        branch = _carried(way, step, branch, undo=True)
    a, b, inner, outer = branch.a, branch.b, branch.inner, branch.outer
    if inner is not None and float(inner.abs().max()) > _ROUNDING * float(a.abs().max()):
        pushed = b @ inner
        outer = pushed if outer is None else outer + pushed
    return LowRank(a, b, branch.scale, None, outer)


def _carried(way: Way, step: Step, branch: LowRank, undo: bool) -> LowRank:
    """A branch carried over one step, or back."""
    known = [way.tensors[name].to(branch.a.dtype) for name in step.tensors]
    if step.kind == "shift":
        moved = branch.a @ (-known[0] if undo else known[0])
        return dataclasses.replace(branch, inner=moved if branch.inner is None else branch.inner + moved)
    if step == CHANGED:
        return branch
    found = axis_map(step.kind)
    apply = found.back if undo else found.forth
    assert apply is not None, f"{step.kind} has a map of its own"
    if step.side == "in":
        return dataclasses.replace(branch, a=apply(branch.a, step.place + 1, step.numbers, known))
    b, outer = (
        None if x is None else apply(x, step.place, step.numbers, known) for x in (branch.b, branch.outer)
    )
    assert b is not None
    return dataclasses.replace(branch, b=b, outer=outer)
