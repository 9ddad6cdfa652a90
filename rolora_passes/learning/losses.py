"""What training makes less: of the next token, of the distance from a teacher, or of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

from rolora_passes.loading.instructions import IGNORED

Values = Mapping[str, Tensor]
"""A graph's logits [B, S, V] as "result", and as "hidden" what its head reads [B, S, D]."""


def cross_entropy(found: Values, labels: Tensor) -> Tensor:
    """Of the next token, where it is predicted: the mean, nats per token; 0 where nothing is."""
    logits, wanted = found["result"][:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    return total / (wanted != IGNORED).sum().clamp_min(1)


def distillation(found: Values, wanted: Values, labels: Tensor) -> Tensor:
    """KL from what the teacher gives, over all tokens: the mean, nats per token."""
    mine, its = (F.log_softmax(v["result"].flatten(0, 1).float(), -1) for v in (found, wanted))
    return F.kl_div(mine, its, log_target=True, reduction="batchmean")


def hidden(found: Values, wanted: Values, labels: Tensor) -> Tensor:
    """RILQ's (Lee et al., 2024): half the mean squared error of what the head reads, half the
    cross-entropy."""
    error = F.mse_loss(found["hidden"].float(), wanted["hidden"].float())
    return 0.5 * error + 0.5 * cross_entropy(found, labels)


def logits(found: Values, wanted: Values, labels: Tensor) -> Tensor:
    """RILQ's other: the mean squared error of the logits in place of the hidden states'."""
    error = F.mse_loss(found["result"].float(), wanted["result"].float())
    return 0.5 * error + 0.5 * cross_entropy(found, labels)


LOSSES: dict[str, Callable[[Values, Values, Tensor], Tensor]] = {
    "distillation": distillation,
    "hidden": hidden,
    "logits": logits,
}
"""Those that have a teacher, by the name that options give them."""
