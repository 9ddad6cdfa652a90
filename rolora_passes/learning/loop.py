"""The loop: gradients of a quantized graph's loss with respect to what is trained."""

from __future__ import annotations

import copy
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
from torch.nn.utils import clip_grad_norm_

from rolora_passes.errors import PassError
from rolora_passes.extras import require
from rolora_passes.files import writing
from rolora_passes.graphs.devices import has_bfloat16, seeded
from rolora_passes.graphs.inputs import positions_like
from rolora_passes.learning import losses, processes
from rolora_passes.learning.layered import LayeredGraph
from rolora_passes.loading.instructions import IGNORED
from rolora_passes.numerics.stiefel import Variables

if TYPE_CHECKING:
    from rolora_passes.learning.options import Options

_SAVE_SECONDS = 60.0
_log = logging.getLogger(__name__)


@dataclass
class Trace:
    """What training did.

    Attributes:
        losses: of every step.
        seconds: it took, those before a resumption too.
        validation: (steps done, loss of the windows held out) at every evaluation.
        best: steps done when that loss was least; the variables are those of then.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: int | None = None


def train(
    student: LayeredGraph,
    teacher: LayeredGraph | None,
    variables: Variables,
    windows: Windows,
    options: Options,
    file: Path | None,
    on_progress: Callable[[str, int, int], None],
) -> Trace:
    """Train variables in place.

    Every step reads the next `batch` windows in their order, from the beginning again when they are used up;
    of several processes each reads its part of them. Nothing but dropout is drawn, and that from the step's
    number, so equal options give equal results.

    Args:
        student: a quantized graph; its variables are named as `variables` names them.
        teacher: the graph in floating point, for distillation.
        windows: what to learn from, and what is held out.
        file: where the state is kept, to go on from it; None to keep nothing.
        on_progress: called with the pass and the last loss, how many steps are done, and of how many.

    Raises:
        PassError: the loss is not finite; says at which step, and where the last good state is.
    """
    run = _Run(student, teacher, variables, windows, options, file)
    run.resume()
    on_progress(options.name, run.step, options.steps)
    while run.step < options.steps and not run.stopped:
        run.advance()
        on_progress(f"{options.name}, loss {run.trace.losses[-1]:.4g}", run.step, options.steps)
        run.validate()
    run.save()
    run.take_best()
    return run.trace


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and what is to be predicted in them.

    Attributes:
        tokens: int64 [N, S], on the device to train on.
        labels: int64 [N, S], -100 where nothing is.
        held: how many of the last are held out, to see when training stops to help.
    """

    tokens: Tensor
    labels: Tensor
    held: int = 0

    def at(self, places: Tensor) -> Windows:
        """Some of them."""
        places = places.to(self.tokens.device)
        return Windows(self.tokens[places], self.labels[places])

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return int((self.labels[:, 1:] != IGNORED).sum())


class _Run:
    """The state of a training: variables, optimisers, and how far it is."""

    def __init__(
        self,
        student: LayeredGraph,
        teacher: LayeredGraph | None,
        variables: Variables,
        windows: Windows,
        options: Options,
        file: Path | None,
    ) -> None:
        get_scheduler = require("transformers.optimization", "transformers").get_scheduler
        self.student, self.teacher, self.variables = student, teacher, variables
        self.windows, self.options, self.file = windows, options, file
        self.shared = processes.synchronised(variables)
        self.optimizers = options.optimizers(variables)
        warm, steps = math.ceil(options.warmup * options.steps), options.steps
        self.schedules = [get_scheduler(options.schedule, o, warm, steps) for o in self.optimizers]
        self.step, self.trace, self._saved = 0, Trace(), time.perf_counter()
        self._best: dict[str, Any] | None = None

    def advance(self) -> None:
        """One step of every optimiser."""
        start = time.perf_counter()
        values = self.shared()
        leaves = [value.detach().requires_grad_() for value in values]
        loss = self._backward(leaves)
        torch.autograd.backward(values, [leaf.grad for leaf in leaves])
        clip = math.inf if self.options.clip is None else self.options.clip
        norm = clip_grad_norm_(self.variables.parameters(), clip)
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

    def _backward(self, leaves: list[Tensor]) -> Tensor:
        """Gradients of the loss of the step's windows, of which it returns this process's part."""
        batch, own = self._batch()
        loss, wanted = torch.zeros(()), max(1, batch.predicted)
        with seeded(self.step, self.windows.tokens.device):
            for rows in own:
                # Of the mean over all tokens of the batch; gradients of several processes are averaged.
                part = self._loss(rows, leaves) * (rows.predicted * processes.count() / wanted)
                part.backward()
                loss += part.detach().cpu()
        return loss

    def _batch(self) -> tuple[Windows, list[Windows]]:
        """The windows of the step, and this process's, in the parts that are computed one after another.

        They are those of one process's parts, so that two processes do what one does in two parts.
        """
        first, count = self.step * self.options.batch, len(self.windows.tokens) - self.windows.held
        places = torch.arange(first, first + self.options.batch) % count
        own = places.chunk(processes.count())[processes.rank()]
        return self.windows.at(places), [self.windows.at(p) for p in own.chunk(self.options.accumulate)]

    def _loss(self, rows: Windows, leaves: list[Tensor]) -> Tensor:
        """The mean loss of the tokens that are predicted."""
        inputs = {"tokens": rows.tokens, "positions": positions_like(rows.tokens)}
        known = dict(zip(self.variables.names, leaves, strict=True))
        with self._precision():
            found = self.student(inputs, known, self.options.recompute)
        if self.teacher is None:
            return losses.cross_entropy(found, rows.labels)
        with torch.no_grad(), self._precision():
            wanted = self.teacher(inputs, {})
        return losses.LOSSES[self.options.loss](found, wanted, rows.labels)

    # Validation: what is held out says when to stop, and which variables were best.

    @property
    def stopped(self) -> bool:
        """Whether `patience` evaluations have passed since the best."""
        seen, patience = self.trace.validation, self.options.patience
        if patience is None or self.trace.best is None:
            return False
        return sum(step > self.trace.best for step, _ in seen) >= patience

    def validate(self) -> None:
        """At every `evaluate_every` steps, and at the last: the loss of what is held out."""
        due = self.step % self.options.evaluate_every == 0 or self.step == self.options.steps
        if not self.windows.held or not due:
            return
        start = time.perf_counter()
        loss = self._held_out()
        least = min((value for _, value in self.trace.validation), default=math.inf)
        self.trace.validation.append((self.step, loss))
        if loss < least:
            self.trace.best, self._best = self.step, copy.deepcopy(self.variables.state_dict())
        self.trace.seconds += time.perf_counter() - start
        _log.info("step %d: loss of what is held out %.4f", self.step, loss)

    def _held_out(self) -> float:
        """The mean loss of the tokens predicted in what is held out; every process computes a part."""
        count = len(self.windows.tokens)
        places = torch.arange(count - self.windows.held, count)[processes.rank() :: processes.count()]
        total, tokens = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            values = [value.detach() for value in self.variables()]
            for own in places.split(max(1, self.options.batch // self.options.accumulate)):
                rows = self.windows.at(own)
                total += self._loss(rows, values).cpu() * rows.predicted
                tokens += rows.predicted
        return processes.mean(total) / max(processes.mean(tokens), 1e-9)

    def take_best(self) -> None:
        """Let the variables be those that did best on what is held out, if anything is."""
        if self._best is not None:
            self.variables.load_state_dict(self._best)

    def _precision(self) -> AbstractContextManager[Any]:
        device = self.windows.tokens.device
        if not self.options.bfloat16 or not has_bfloat16(device):
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

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
            "validation": self.trace.validation,
            "best": [self.trace.best, self._best],
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
        best, self._best = state["best"]
        seen = [(int(step), float(loss)) for step, loss in state["validation"]]
        self.step, self.trace = state["step"], Trace(list(state["losses"]), state["seconds"], seen, best)
        _log.info("resumed at step %d", self.step)

    def _kept(self) -> dict[str, Any] | None:
        if self.file is None or not self.file.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, weights_only=True, map_location="cpu")
        except Exception as error:
            raise PassError(
                f"{self.options.name}: {self.file} is damaged: remove it to begin anew"
            ) from error
        return state
