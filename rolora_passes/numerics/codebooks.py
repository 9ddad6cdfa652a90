"""Grids that are tables: a weight as codes, its values scaled by each group's largest magnitude.

A table is a function of the bits, which gives up to 2^bits values on [-1, 1], ascending, float32. Another one
is a function and a line in `TABLES`; other packages register theirs (`numerics.grids`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from rolora_passes.numerics.affine import EPSILON

Table = Callable[[int], Tensor]


def normal_float(bits: int) -> Tensor:
    """NormalFloat (Dettmers et al., 2023), of QLoRA: quantiles of a normal distribution.

    At evenly spaced probabilities, 2^(b-1) of them positive, zero exact, scaled so that the largest is 1.
    """
    half, offset = 2 ** (bits - 1), 0.9677083  # the outermost probability, bitsandbytes' choice
    quantile = NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / half) for i in range(half)]
    below = [-quantile(offset + (0.5 - offset) * i / (half - 1)) for i in range(half - 1)]
    values = torch.tensor(sorted([*above, 0.0, *below]), dtype=torch.float64)
    return (values / values.max()).float()


def evenly_spaced(bits: int) -> Tensor:
    """LoftQ's table (Li et al., 2023): evenly spaced, both ends included; it has no zero."""
    return torch.linspace(-1, 1, 2**bits)


TABLES: Mapping[str, Table] = {"nf": normal_float, "uniform": evenly_spaced}


@dataclass(frozen=True)
class Codebook:
    """The values of a table, by the largest magnitude of each group.

    Attributes:
        name: of the table.
        group_size: input channels that share a scale; None: one scale per output channel.
        table: float32 [at most 2^bits].
    """

    name: str
    bits: int
    group_size: int | None
    table: Tensor = field(repr=False, compare=False)

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight [out, in] put on the grid, float32."""
        scale = absmax(weight, self.group_size)
        table = self.table.to(weight.device)
        return decode(encode(weight, scale, table), scale, table)


def absmax(weight: Tensor, group_size: int | None) -> Tensor:
    """The largest magnitude in every group of a weight [..., n]: float32 [..., groups], never zero."""
    groups: Tensor = weight.unflatten(-1, (-1, group_size or weight.shape[-1]))
    return groups.abs().amax(-1).float().clamp_min(EPSILON)


def encode(weight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest table entry to w / s: uint8 [..., n]."""
    groups = weight.unflatten(-1, (scale.shape[-1], -1)) / scale.to(weight.dtype).unsqueeze(-1)
    halfway = ((table[1:] + table[:-1]) / 2).to(weight.dtype)
    return torch.bucketize(groups, halfway).to(torch.uint8).flatten(-2)


def decode(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """s·table[code] in the scales' type, for codes [..., n] and scales [..., groups]."""
    groups: Tensor = table.to(scale.dtype)[codes.int()].unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale.unsqueeze(-1)).flatten(-2)
