"""What training makes less: of the next token, of the distance from a teacher, or of both.

A loss is a mean over the tokens of a batch. Its functions here give the part of that mean that some of the
tokens have, so that the logits of few need be in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from rolora_passes.loading.instructions import IGNORED


class Ends(NamedTuple):
    """A graph's end for some tokens: what its head reads [..., D], and its logits [..., V]."""

    hidden: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Targets:
    """What some tokens are to be followed by, and what a mean over the batch divides by.

    Attributes:
        following: int64, -100 where nothing is predicted.
        tokens: how many the batch has.
        predicted: how many of those are followed by one that is to be predicted.
    """

    following: Tensor
    tokens: int
    predicted: int


def cross_entropy(found: Ends, wanted: Ends | None, targets: Targets) -> Tensor:
    """Of the next token, where it is predicted: nats per token; 0 where nothing is."""
    logits, following = found.logits.flatten(0, -2).float(), targets.following.flatten()
    total = F.cross_entropy(logits, following, ignore_index=IGNORED, reduction="sum")
    return total / max(1, targets.predicted)


def distillation(found: Ends, wanted: Ends | None, targets: Targets) -> Tensor:
    """KL from what the teacher gives, over all tokens: nats per token."""
    assert wanted is not None
    mine, its = (F.log_softmax(ends.logits.float(), -1) for ends in (found, wanted))
    return F.kl_div(mine, its, log_target=True, reduction="sum") / targets.tokens


def hidden(found: Ends, wanted: Ends | None, targets: Targets) -> Tensor:
    """RILQ's (Lee et al., 2024): half the mean squared error of what the head reads, half the
    cross-entropy."""
    assert wanted is not None
    error = _squared(found.hidden, wanted.hidden) / targets.tokens
    return 0.5 * error + 0.5 * cross_entropy(found, wanted, targets)


def logits(found: Ends, wanted: Ends | None, targets: Targets) -> Tensor:
    """RILQ's other: the mean squared error of the logits in place of the hidden states'."""
    assert wanted is not None
    error = _squared(found.logits, wanted.logits) / targets.tokens
    return 0.5 * error + 0.5 * cross_entropy(found, wanted, targets)


def _squared(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean over channels, the sum over tokens."""
    return F.mse_loss(found.float(), wanted.float(), reduction="sum") / found.shape[-1]


Loss = Callable[[Ends, Ends | None, Targets], Tensor]
LOSSES: dict[str, Loss] = {"distillation": distillation, "hidden": hidden, "logits": logits}
"""Those that have a teacher, by the name that options give them."""
