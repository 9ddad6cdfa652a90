"""TuneLoRA: train the low-rank branches of a graph; everything else stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from rolora_passes.adapters.lora import find_branches
from rolora_passes.errors import PassError
from rolora_passes.graphs.devices import device_of
from rolora_passes.graphs.graph import finish, get_tensor, insert, root_names, set_tensor, site_names
from rolora_passes.learning.losses import LOSSES
from rolora_passes.numerics.stiefel import Variables
from rolora_passes.passes.base import Calibration, Kind, Report
from rolora_passes.passes.training import Training


@dataclass(frozen=True)
class TuneLoRA(Training):
    """Train A and B of every branch, on text or on instructions
    (`rolora_passes.loading.instructions.instruction_windows`).

    Before:                                  After:
        y = y' + linear(linear(x, A), B) * s     the same, A and B other numbers

    The base is frozen: in floating point after rotation (RoLoRA, Huang et al., 2024, whose options are the
    defaults), before it (a branch that rotate has written on is trained through what it wrote), or quantized
    (QLoRA).

    Options, beside those of every pass that trains:
        lr, weight_decay: AdamW's.
        dropout: the share of a branch's inputs that a step drops, from 0 to 1.
        loss: also "hidden" or "logits"; see rilq.

    Raises:
        PassError: no branches; what every pass that trains raises.
    """

    name: ClassVar[str] = "tune-lora"
    kind: ClassVar[Kind] = "trained"
    forbids: ClassVar[tuple[str, ...]] = ("activations quantized", "cache quantized")

    under: str | tuple[Any, ...] = "W16A16"
    losses: ClassVar[tuple[str, ...]] = ("cross-entropy", *LOSSES)

    loss: str = "cross-entropy"
    warmup: float = 0.01
    lr: float = 1e-4
    weight_decay: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise PassError(f"{self.name}: dropout must be from 0 to below 1, found {self.dropout}")

    def optimizers(self, variables: Variables) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(variables.parameters(), self.lr, weight_decay=self.weight_decay)]

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        self._require(graph)
        branches, names = find_branches(graph), site_names(graph)
        if not branches:
            raise PassError(
                f"{self.name}: expected low-rank branches to train, found none: run add-lora first"
            )
        halves = [root_names(half.args[1])[0] for b in branches for half in (b.low, b.high)]
        student = self._under(graph, calibration.tokens)
        self._drop(student)
        variables = Variables({}, {name: get_tensor(student, name) for name in halves}, "cayley-adam")
        teacher = None if self.loss == "cross-entropy" else self._reference(calibration)
        notes = self._train(graph, student, teacher, variables, calibration)
        for name, value in zip(variables.names, variables(), strict=True):
            set_tensor(graph, name, value.detach().to(device_of(graph)))
        return Report(changed=[f"{names[b.linear]}: branch" for b in branches], notes=notes)

    def _drop(self, student: fx.GraphModule) -> None:
        """Dropout before every branch; such a graph is for training."""
        if self.dropout:
            for branch in find_branches(student):
                branch.low.update_arg(
                    0, insert(student, branch.low, _dropped, branch.low.args[0], self.dropout)
                )
            finish(student)


def _dropped(x: Tensor, part: float) -> Tensor:
    """Dropout where there is a gradient: what is held out is computed as it will be deployed."""
    return functional.dropout(x, part, training=torch.is_grad_enabled())
