"""The loss of a quantized graph's end, from which gradients go back through all of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rolora_passes.graphs.inputs import positions_like
from rolora_passes.learning import losses
from rolora_passes.learning.layered import LayeredGraph
from rolora_passes.learning.loop import Windows


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
        """The mean over the tokens that are predicted."""
        inputs = {"tokens": rows.tokens, "positions": positions_like(rows.tokens)}
        with self._precision(rows.tokens.device):
            found = self.student(inputs, variables, self.recompute)
        if self.teacher is None:
            return losses.cross_entropy(found, rows.labels)
        with torch.no_grad(), self._precision(rows.tokens.device):
            wanted = self.teacher(inputs, {})
        return losses.LOSSES[self.loss](found, wanted, rows.labels)

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if self.bfloat16 else nullcontext()
