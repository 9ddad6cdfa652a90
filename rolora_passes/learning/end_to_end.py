"""The loss of a quantized graph's end, from which gradients go back through all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rolora_passes.graphs.devices import has_bfloat16
from rolora_passes.graphs.inputs import positions_like
from rolora_passes.learning.layered import LayeredGraph
from rolora_passes.learning.loop import Windows
from rolora_passes.learning.losses import LOSSES, Ends, Targets, cross_entropy
from rolora_passes.loading.instructions import IGNORED

# Tokens whose logits are in memory together.
_TOKENS = 128


@dataclass(frozen=True)
class EndToEnd:
    """What a student gives for windows of tokens, beside their labels or what a teacher gives.

    Attributes:
        student: a quantized graph.
        teacher: the graph in floating point; None if the loss is of labels alone.
        loss: "cross-entropy", or of `losses.LOSSES`.
        bfloat16, recompute: see `rolora_passes.passes.training.Training`.
    """

    student: LayeredGraph
    teacher: LayeredGraph | None
    loss: str
    bfloat16: bool
    recompute: bool

    def __call__(self, rows: Windows, variables: Mapping[str, Tensor]) -> Tensor:
        """The mean over the tokens of a batch, or over those that are predicted."""
        inputs = {"tokens": rows.tokens, "positions": positions_like(rows.tokens)}
        with self._precision(rows.tokens.device):
            found = self.student(inputs, variables, self.recompute)
            with torch.no_grad():
                wanted = None if self.teacher is None else self.teacher(inputs, {})
        following = torch.full_like(rows.labels, IGNORED)
        following[:, :-1] = rows.labels[:, 1:]
        loss = cross_entropy if self.teacher is None else LOSSES[self.loss]

        def part(some: slice, *values: Tensor) -> Tensor:
            targets = Targets(following.flatten()[some], following.numel(), rows.predicted)
            taught = None
            if self.teacher is not None and wanted is not None:
                with torch.no_grad():
                    taught = self._ends(self.teacher, wanted, some)
            return loss(self._ends(self.student, values, some), taught, targets)

        total = _Sum.apply(part, self._chunks(following.numel()), *found)  # type: ignore[no-untyped-call]
        return cast(Tensor, total)

    def _chunks(self, count: int) -> list[slice]:
        """Tokens whose logits are computed together: all, where a head does not work on each for itself."""
        apart = all(graph.by_token for graph in (self.student, self.teacher) if graph is not None)
        step = _TOKENS if apart else count
        return [slice(start, start + step) for start in range(0, count, step)]

    def _ends(self, graph: LayeredGraph, values: Sequence[Tensor], some: slice) -> Ends:
        """A graph's end for some tokens [n, ...], from what `LayeredGraph.forward` gave."""
        hidden, *beside = values
        with self._precision(hidden.device):
            if not graph.by_token:
                return Ends(hidden.flatten(0, 1), graph.logits(hidden, *beside).flatten(0, 1)[some])
            hidden = hidden.flatten(0, 1)[some]
            return Ends(hidden, graph.logits(hidden[None], *beside)[0])

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if not self.bfloat16 or not has_bfloat16(device):
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)


class _Sum(torch.autograd.Function):
    """The sum of a function over chunks, with the gradient of each chunk taken before the next is computed.

    What the chunks have in common gets its gradient in float32.
    """

    @staticmethod
    def forward(ctx: Any, part: Callable[..., Tensor], chunks: list[slice], *values: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        leaves = [v.detach().float().requires_grad_(w) for v, w in zip(values, wanted, strict=True)]
        total = torch.zeros((), device=values[0].device)
        for chunk in chunks:
            with torch.set_grad_enabled(any(wanted)):
                loss = part(chunk, *leaves)
                if any(wanted):
                    loss.backward()
            total += loss.detach()
        ctx.save_for_backward(
            *(
                None if leaf.grad is None else leaf.grad.to(v.dtype)
                for leaf, v in zip(leaves, values, strict=True)
            )
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else g * grad for g in ctx.saved_tensors)
