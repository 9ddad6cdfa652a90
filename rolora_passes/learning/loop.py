"""The loop: gradients of a quantized graph's loss with respect to what is trained."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from rolora_passes.errors import PassError
from rolora_passes.graphs.files import writing
from rolora_passes.graphs.inputs import positions_like
from rolora_passes.graphs.split import LayeredGraph
from rolora_passes.learning import processes
from rolora_passes.learning.stiefel import Variables

if TYPE_CHECKING:
    from rolora_passes.learning.training import Training

_SAVE_SECONDS = 60.0
_log = logging.getLogger(__name__)


@dataclass
class Trace:
    """What training did: the loss of every step, and the seconds it took, those before a resumption too."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    student: LayeredGraph,
    teacher: LayeredGraph | None,
    variables: Variables,
    tokens: Tensor,
    options: Training,
    file: Path | None,
    on_progress: Callable[[str, int, int], None],
) -> Trace:
    """Train variables in place.

    Every step reads the next `batch` windows in their order, from the beginning again when they are used up;
    of several processes each reads its part of them. Nothing is drawn, so equal options give equal results.

    Args:
        student: a quantized graph; its variables are named as `variables` names them.
        teacher: the graph in floating point, for distillation.
        tokens: int64 [N, S].
        file: where the state is kept, to go on from it; None to keep nothing.
        on_progress: called with the pass and the last loss, how many steps are done, and of how many.

    Raises:
        PassError: the loss is not finite; says at which step, and where the last good state is.
    """
    run = _Run(student, teacher, variables, tokens, options, file)
    run.resume()
    on_progress(options.name, run.step, options.steps)
    while run.step < options.steps:
        run.advance()
        on_progress(f"{options.name}, loss {run.trace.losses[-1]:.4g}", run.step, options.steps)
    run.save()
    return run.trace


class _Run:
    """The state of a training: variables, optimisers, and how far it is."""

    def __init__(
        self,
        student: LayeredGraph,
        teacher: LayeredGraph | None,
        variables: Variables,
        tokens: Tensor,
        options: Training,
        file: Path | None,
    ) -> None:
        self.student, self.teacher, self.variables = student, teacher, variables
        self.tokens, self.options, self.file = tokens, options, file
        self.shared = processes.synchronised(variables)
        self.optimizers = options.optimizers(variables)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, self._cosine) for o in self.optimizers]
        self.step, self.trace, self._saved = 0, Trace(), time.perf_counter()

    def _cosine(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / self.options.steps))

    def advance(self) -> None:
        """One step of every optimiser."""
        start = time.perf_counter()
        values = self.shared()
        leaves = [value.detach().requires_grad_() for value in values]
        loss = torch.zeros(())
        parts = self._batch().chunk(self.options.accumulate)
        for rows in parts:
            part = self._loss(rows, leaves) / len(parts)
            part.backward()
            loss += part.detach().cpu()
        torch.autograd.backward(values, [leaf.grad for leaf in leaves])
        norm = clip_grad_norm_(self.variables.parameters(), self.options.clip)
        self._require_finite(mean := processes.mean(loss), float(norm))
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.trace.losses.append(mean)
        self.trace.seconds += time.perf_counter() - start
        _log.info("step %d: loss %.4f, gradient norm %.2f", self.step, mean, float(norm))
        if time.perf_counter() - self._saved > _SAVE_SECONDS:
            self.save()

    def _batch(self) -> Tensor:
        """This process's windows of the step, int64 [batch / processes, S].

        They are those of one process's parts, so that two processes do what one does in two parts.
        """
        first = self.step * self.options.batch
        places = torch.arange(first, first + self.options.batch) % len(self.tokens)
        return self.tokens[places].chunk(processes.count())[processes.rank()]

    def _loss(self, rows: Tensor, leaves: list[Tensor]) -> Tensor:
        inputs = {"tokens": rows, "positions": positions_like(rows)}
        known = dict(zip(self.variables.names, leaves, strict=True))
        with self._precision():
            logits = self.student(inputs, known, self.options.recompute)
        if self.teacher is None:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
        with torch.no_grad(), self._precision():
            wanted = F.log_softmax(self.teacher(inputs, {}).flatten(0, 1).float(), -1)
        found = F.log_softmax(logits.flatten(0, 1).float(), -1)
        return F.kl_div(found, wanted, log_target=True, reduction="batchmean")

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.options.bfloat16:
            return nullcontext()
        return torch.autocast(self.tokens.device.type, torch.bfloat16)

    def _require_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.save()
        kept = f"; the state before it is in {self.file}" if self.file else ""
        raise PassError(
            f"{self.options.name}: expected a finite loss and gradient at step {self.step + 1}, found {loss} "
            f"and {norm}: use a smaller lr, or bfloat16: false{kept}"
        )

    # What makes a run go on where it stopped.

    def save(self) -> None:
        """Keep the state; one process writes for all."""
        self._saved = time.perf_counter()
        if self.file is None or processes.rank():
            return
        state = {
            "step": self.step,
            "losses": self.trace.losses,
            "seconds": self.trace.seconds,
            "variables": self.variables.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
        }
        with writing(self.file) as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Go on from a state that an earlier run of the same training kept."""
        state = processes.from_first(self._kept())
        if state is None:
            return
        self.variables.load_state_dict(state["variables"])
        owners: list[Any] = [*self.optimizers, *self.schedules]
        for owner, kept in zip(owners, [*state["optimizers"], *state["schedules"]], strict=True):
            owner.load_state_dict(kept)
        self.step, self.trace = state["step"], Trace(list(state["losses"]), state["seconds"])
        _log.info("resumed at step %d", self.step)

    def _kept(self) -> dict[str, Any] | None:
        if self.file is None or not self.file.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, weights_only=True)
        except Exception as error:
            raise PassError(
                f"{self.options.name}: {self.file} is damaged: remove it to begin anew"
            ) from error
        return state
