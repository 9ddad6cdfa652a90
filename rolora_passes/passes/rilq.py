"""RILQ: branches beside quantized weights, trained by one loss of the model's end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rolora_passes.passes.tune_lora import TuneLoRA


@dataclass(frozen=True)
class RILQ(TuneLoRA):
    """Train branches beside quantized weights to make up for the whole model's error (RILQ, Lee et al.,
    2024).

    One loss of the model's end, in place of one for every linear, lets branches make up for each other's
    sites, so that little rank is enough: half the mean squared error of what the head reads from what it
    reads in the graph before rounding, half the cross-entropy of the next token. The branches may start at
    zero (add-lora after quantize-weights) or as LoftQ left them; it stands in one list with what rounded the
    weights.

    Before:                                                After:
        y = linear(x, dequantize(q, s))                        the same, A and B other numbers
        y = y + linear(linear(x, A), B) * scale

    Options: those of tune-lora, with RILQ's as defaults; its script counts steps in parts of a batch, and
    looks every 25 updates.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonical", "weights quantized")

    loss: str = "hidden"
    steps: int = 1250
    schedule: str = "constant"
    warmup: float = 0.0
    clip: float | None = None
    validation: float = 0.2
    patience: int | None = 5
