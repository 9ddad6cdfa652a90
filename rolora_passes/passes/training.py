"""What passes that train have in common: a budget, the quantizers to train under, and an account."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.devices import place_of
from rolora_passes.graphs.graph import linears, parameters
from rolora_passes.graphs.inputs import require_decoder
from rolora_passes.graphs.sites import is_head
from rolora_passes.graphs.text import graph_text
from rolora_passes.learning import processes
from rolora_passes.learning.layered import LayeredGraph
from rolora_passes.learning.loop import Windows, train
from rolora_passes.memory import peak_mb
from rolora_passes.numerics.stiefel import Variables
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.manager import apply_passes
from rolora_passes.passes.registry import make_pass
from rolora_passes.passes.setting import Setting, quantizers
from rolora_passes.quantize.quantizers import require_float32, straighten

# Those of transformers that need no options of their own.
_SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class Training(Pass):
    """Passes that train parameters of a graph have one loop, and these options in common.

    A copy of the graph is given the quantizers to come, with gradients straight through them (Bengio et al.,
    2013), and the loss of that copy on the calibration tokens is made less.

    Options:
        under: the quantizers to come: a setting ("W16A8"), or a list of passes. GPTQ is taken as rounding to
            nearest; a clip search tries fewer clips.
        loss: "cross-entropy" of the next token, where the calibration's labels have one, or "distillation":
            KL from what the graph computes in floating point.
        steps (updates): how long to train.
        batch (windows): windows per update, in their order.
        accumulate: compute a batch in this many parts, one after another, to need less memory.
        clip: clip the norm of the gradient to this; None: do not.
        bfloat16: compute in bfloat16 where torch's autocast does and the device can; what is trained stays
            float32.
        recompute: keep what passes between layers, and compute the rest again (activation checkpointing).
        shard: divide the layers' weights between the processes of torchrun.
        schedule, warmup: of the rates ("cosine", "linear", "constant", "constant_with_warmup"), and the part
            of the steps in which they rise.
        validation: the part of the windows, the last of them, that is held out; what is trained is then as it
            was when their loss was least.
        evaluate_every (updates): how often to evaluate the held-out windows.
        patience (evaluations): stop after this many without a new lowest loss; None: never.

    Raises:
        PassError: windows that do not divide among processes, no graph to distil, a loss that is not finite.
    """

    # What a head reads is compared only where training leaves its basis alone.
    losses: ClassVar[tuple[str, ...]] = ("cross-entropy", "distillation")

    under: str | tuple[Any, ...] = "W4A4KV4"
    loss: str = "distillation"
    steps: int = 100
    batch: int = 8
    accumulate: int = 1
    clip: float | None = 1.0
    bfloat16: bool = False
    recompute: bool = False
    shard: bool = False
    schedule: str = "cosine"
    warmup: float = 0.0
    validation: float = 0.0
    evaluate_every: int = 25
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.loss not in self.losses:
            raise PassError(f"{self.name}: expected a loss of {self.losses}, found {self.loss!r}")
        if self.schedule not in _SCHEDULES:
            raise PassError(f"{self.name}: expected a schedule of {_SCHEDULES}, found {self.schedule!r}")
        for option in ("warmup", "validation"):
            if not 0 <= getattr(self, option) < 1:
                raise PassError(
                    f"{self.name}: {option} must be from 0 to below 1, found {getattr(self, option)}"
                )
        for option in ("steps", "batch", "accumulate", "evaluate_every"):
            if getattr(self, option) < 1:
                raise PassError(f"{self.name}: {option} must be 1 or more, found {getattr(self, option)}")
        for option in ("lr", "scale_lr", "clip"):
            value = getattr(self, option, None)
            if value is not None and not value > 0:
                raise PassError(f"{self.name}: {option} must be above 0, found {value}")
        self._quantizers()

    @property
    def needs_calibration(self) -> bool:
        return True

    def optimizers(self, variables: Variables) -> list[torch.optim.Optimizer]:
        """What moves the variables, at the rates of the options."""
        raise NotImplementedError

    def _require(self, graph: fx.GraphModule) -> None:
        """Join the processes of torchrun, and refuse what cannot be trained by them."""
        require_float32(graph, self.name)
        require_decoder(graph, self.name)
        processes.join()
        if self.batch % (processes.count() * self.accumulate):
            raise PassError(
                f"{self.name}: expected a batch that {processes.count()} processes times {self.accumulate} "
                f"parts divide, found {self.batch}"
            )

    def _under(self, graph: fx.GraphModule, tokens: Tensor) -> fx.GraphModule:
        """A copy with the quantizers to come."""
        twin = apply_passes(graph, self._quantizers(), verify=False, calibration=tokens)
        straighten(twin)
        return twin

    def _reference(self, calibration: Calibration) -> fx.GraphModule:
        """The graph before anything was rounded, which a loss that has a teacher distills."""
        reference = calibration.reference
        if reference is None:
            raise PassError(
                f"{self.name}: expected the graph in floating point to distil, found none: apply the passes "
                "that round weights and this one in one list, or set loss to cross-entropy"
            )
        return reference

    def _quantizers(self) -> list[Pass]:
        """What rounds while training: as the options say, GPTQ's weights to nearest, nothing folded."""
        if isinstance(self.under, str):
            steps = quantizers(Setting.parse(self.under), "rtn")
        else:
            steps = [make_pass(spec) for spec in self.under]
        return [_to_nearest(step) for step in steps if step.name != "fold-constants"]

    def _train(
        self,
        graph: fx.GraphModule,
        student: fx.GraphModule,
        teacher: fx.GraphModule | None,
        variables: Variables,
        calibration: Calibration,
    ) -> dict[str, Any]:
        """Train the variables of a student in place; returns the account of it, for a report's notes."""
        device = place_of(graph).device
        windows, work = self.windows(calibration, device), calibration.work
        trace = train(
            self._layered(student, variables.names),
            None if teacher is None else self._layered(teacher, []),
            variables.to(device),
            windows,
            self,
            None if work is None else work / self._file(graph, windows),
            calibration.on_progress,
        )
        account = {"losses": trace.losses, "seconds": round(trace.seconds, 1)}
        held = {"validation": trace.validation, "best": trace.best} if windows.held else {}
        return {**account, **held, "peak_mb": peak_mb(), "processes": processes.count()}

    def windows(self, calibration: Calibration, device: torch.device | None = None) -> Windows:
        """What to learn from, and what is held out, on a device.

        Raises:
            PassError: labels that are not the tokens', or nothing to learn from.
        """
        tokens, labels = calibration.tokens, calibration.labels
        device = tokens.device if device is None else device
        labels = tokens if labels is None else labels
        if labels.shape != tokens.shape:
            raise PassError(
                f"{self.name}: expected labels like the tokens, {list(tokens.shape)}, found "
                f"{list(labels.shape)}"
            )
        held = math.ceil(self.validation * len(tokens))
        windows = Windows(tokens.to(device), labels.to(device), held)
        if len(tokens) - held < 1 or not windows.at(torch.arange(len(tokens) - held)).predicted:
            raise PassError(
                f"{self.name}: expected windows to learn from, found {len(tokens)}, {held} of them held out, "
                "and no token to predict in the others: give more examples, shorter windows, or a smaller "
                "validation"
            )
        return windows

    def _layered(self, graph: fx.GraphModule, variables: Collection[str]) -> LayeredGraph:
        watched = {"hidden": self._before_head(graph)} if self.loss == "hidden" else {}
        layered = LayeredGraph(graph, variables, watched)
        if self.shard and processes.count() > 1:
            processes.shard(layered)
        return layered

    def _before_head(self, graph: fx.GraphModule) -> str:
        """The name of what the head reads."""
        heads = [node for node in linears(graph) if is_head(node)]
        if len(heads) != 1:
            raise PassError(f"{self.name}: loss hidden is of what one head reads, found {len(heads)} heads")
        return cast(fx.Node, heads[0].args[0]).name

    def _file(self, graph: fx.GraphModule, windows: Windows) -> Path:
        """A name that no other training has."""
        digest = hashlib.sha256(graph_text(graph).encode())
        digest.update(json.dumps([self.options(), torch.__version__], default=str, sort_keys=True).encode())
        for value in (windows.tokens, windows.labels, *parameters(graph).values()):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return Path(f"{self.name}-{digest.hexdigest()[:16]}.pt")


def _to_nearest(step: Pass) -> Pass:
    gptq = getattr(step, "method", None) == "gptq"
    return dataclasses.replace(step, method="rtn") if gptq else step  # type: ignore[call-arg]
