"""What the loop asks of those who train: budgets, rates, and what moves the variables."""

from __future__ import annotations

from typing import Protocol

import torch

from rolora_passes.numerics.stiefel import Method, Variables


class Options(Protocol):
    """Options of a training; `rolora_passes.passes.training.Training` says what each is."""

    @property
    def name(self) -> str: ...
    @property
    def loss(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def clip(self) -> float | None: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup(self) -> float: ...
    @property
    def evaluate_every(self) -> int: ...
    @property
    def patience(self) -> int | None: ...

    def optimizers(self, variables: Variables) -> list[torch.optim.Optimizer]:
        """What moves the variables, at the rates of the options."""
        ...


class SampleOptions(Options, Protocol):
    """Those of learning from samples; `passes.learn_rotation.LearnRotation` says what each is."""

    @property
    def method(self) -> Method: ...
    @property
    def tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def validation(self) -> float: ...
