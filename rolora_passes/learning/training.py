"""What passes that train have in common: a budget, the quantizers to train under, and an account."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.fold_constants import FoldConstants
from rolora_passes.graphs.accounting import peak_mb
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.inputs import require_decoder
from rolora_passes.graphs.quantizers import require_float32, straighten
from rolora_passes.graphs.split import LayeredGraph
from rolora_passes.graphs.text import graph_text
from rolora_passes.learning import processes
from rolora_passes.learning.loop import train
from rolora_passes.learning.stiefel import Variables
from rolora_passes.manager import apply_passes
from rolora_passes.passes import Calibration, Pass
from rolora_passes.quantize_weights import QuantizeWeights
from rolora_passes.registry import make_pass
from rolora_passes.settings import Setting, quantizers

_LOSSES = ("cross-entropy", "distillation")


@dataclass(frozen=True)
class Training(Pass):
    """Base of passes that train parameters of a graph; they document these options.

    A copy of the graph is given the quantizers to come, with gradients straight through them (Bengio et al.,
    2013), and the loss of that copy on the calibration tokens is made less.
    """

    under: str | tuple[Any, ...] = "W4A4KV4"
    loss: str = "distillation"
    steps: int = 100
    batch: int = 8
    accumulate: int = 1
    clip: float = 1.0
    bfloat16: bool = False
    recompute: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if self.loss not in _LOSSES:
            raise PassError(f"{self.name}: expected a loss of {_LOSSES}, found {self.loss!r}")
        for option in ("steps", "batch", "accumulate"):
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

    def _quantizers(self) -> list[Pass]:
        """What rounds while training: as the options say, GPTQ's weights to nearest, nothing folded."""
        if isinstance(self.under, str):
            steps = quantizers(Setting.parse(self.under), "rtn")
        else:
            steps = [make_pass(spec) for spec in self.under]
        return [_to_nearest(step) for step in steps if not isinstance(step, FoldConstants)]

    def _train(
        self,
        graph: fx.GraphModule,
        student: fx.GraphModule,
        teacher: fx.GraphModule | None,
        variables: Variables,
        calibration: Calibration,
    ) -> dict[str, Any]:
        """Train the variables of a student in place; returns the account of it, for a report's notes."""
        tokens, work = calibration.tokens, calibration.work
        trace = train(
            self._layered(student, variables.names),
            None if teacher is None else self._layered(teacher, []),
            variables,
            tokens,
            self,
            None if work is None else work / self._file(graph, tokens),
            calibration.on_progress,
        )
        account = {"losses": trace.losses, "seconds": round(trace.seconds, 1)}
        return {**account, "peak_mb": peak_mb(), "processes": processes.count()}

    def _layered(self, graph: fx.GraphModule, variables: Collection[str]) -> LayeredGraph:
        layered = LayeredGraph(graph, variables)
        if self.shard and processes.count() > 1:
            processes.shard(layered)
        return layered

    def _file(self, graph: fx.GraphModule, tokens: Tensor) -> Path:
        """A name that no other training has."""
        digest = hashlib.sha256(graph_text(graph).encode())
        digest.update(json.dumps([self.options(), torch.__version__], default=str, sort_keys=True).encode())
        for value in (tokens, *parameters(graph).values()):
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return Path(f"{self.name}-{digest.hexdigest()[:16]}.pt")


def _to_nearest(step: Pass) -> Pass:
    gptq = isinstance(step, QuantizeWeights) and step.method == "gptq"
    return dataclasses.replace(step, method="rtn") if gptq else step  # type: ignore[call-arg]
