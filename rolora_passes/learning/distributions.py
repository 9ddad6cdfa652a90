"""Losses of a distribution: how far from flat the values are that linears read in a rotated basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rolora_passes.learning.samples import Samples

# That of a uniform distribution: the fourth moment over the square of the second.
_UNIFORM = 1.8


def whip(values: Tensor) -> Tensor:
    """DartQuant's (2025): the sum of exp(-|x|) over channels, the mean over tokens.

    What a rotation leaves of a token is its norm; fewer values near zero then mean smaller ones at the top.

    Args:
        values: [..., C], C channels.
    """
    return values.abs().neg().exp().sum(-1).mean()


def kurtosis(values: Tensor) -> Tensor:
    """KurTail's (Akhondzadeh et al., 2025): how far each token's kurtosis is from the uniform distribution's,
    1.8; the mean over tokens.

    Args:
        values: [..., C], C channels.
    """
    centred = values - values.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    fourth = centred.square().square().mean(-1)
    return (fourth / variance.square().clamp_min(1e-12) - _UNIFORM).abs().mean()


DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {"whip": whip, "kurtosis": kurtosis}
"""By the name that options give them."""


@dataclass(frozen=True)
class Distribution:
    """The loss of one rotation on samples alone: no weight is read, and no model is behind it.

    Attributes:
        loss: of `DISTRIBUTIONS`.
        start: [n, n], the rotation whose basis the samples are in.
    """

    loss: str
    start: Tensor

    def __call__(self, rows: Samples, variables: Mapping[str, Tensor]) -> Tensor:
        """The mean over sites."""
        (rotation,) = variables.values()
        turn = self.start.T @ rotation
        turned = (torch.einsum("wtona,nm->wtoma", site, turn).flatten(2) for site in rows.sites)
        return torch.stack([DISTRIBUTIONS[self.loss](values) for values in turned]).mean()
