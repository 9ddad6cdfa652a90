"""The arithmetic of uniform grids, on plain tensors: integers, as torchao's affine quantization has them.

With scale s and zero point z,
q = clamp(round(w · (1/s)) + z, low, high) and w ≈ s·(q - z). Symmetric grids have z = 0. Scales belong to
*groups* of `group_size` neighbours along the last axis; a group as wide as the axis is a row (an output
channel of a weight, a token of an activation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rolora_passes.moved import old_names

EPSILON = torch.finfo(torch.float32).eps  # scales are at least this, as torchao's are
_SHRINK = [1 - i / 100 for i in range(80)]  # 1.00, 0.99, …, 0.21
_SHRINK_COARSE = [1 - i / 20 for i in range(8)]  # 1.00, 0.95, …, 0.65: 4-bit weights end between 0.7 and 1
_NORM = 2.4
_BLOCK = 1 << 18  # elements searched or rounded at a time: what stays in the caches


def limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The integers of a grid: -2^(b-1) .. 2^(b-1) - 1, and -127 .. 127 where 8 bits are symmetric.

    (The kernels for 8-bit weights leave -128 out, so that a product of two bytes always fits.)
    """
    high = 2 ** (bits - 1) - 1
    return (-high if symmetric and bits == 8 else -high - 1), high


@dataclass(frozen=True)
class Integers:
    """Evenly spaced values around zero, or with a zero point: the grid `int`, which the kernels read.

    Attributes:
        group_size: input channels that share a scale; None: one scale per output channel. Scales of
            groups are rounded to bfloat16, which is what the int4 kernels hold.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    clip_search: bool = False

    def choose(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`choose_qparams` for a weight [out, in]."""
        grouped = self.group_size is not None
        return choose_qparams(weight, self.group_size, self.bits, self.symmetric, self.clip_search, grouped)

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight [out, in] put on the grid, float32."""
        return _on_grid(weight, *self.choose(weight), self.bits, self.symmetric)


def choose_qparams(
    weight: Tensor,
    group_size: int | None,
    bits: int,
    symmetric: bool = True,
    clip_search: bool = False,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points for every group of a weight.

    Symmetric: s = max|w| / (2^(b-1) - 1), z = 0. Asymmetric: the range [min(w, 0), max(w, 0)] over 2^b - 1
    steps. With clip search, each group's range is shrunk by the p of 1.00, 0.99, …, 0.21 that makes
    sum |w - ŵ|^2.4 least (the search of GPTQ's and QuaRot's code).

    Args:
        weight: [..., n], n a multiple of `group_size`; None: one group, of all n.
        bfloat16: round the scales to bfloat16, which is what the int4 kernels hold for groups, so that
            graph and kernel agree.

    Returns: scale float32 and zero point int8, both [..., n / group_size]. Scales are never zero.
    """
    return _choose(weight, group_size, bits, symmetric, _SHRINK if clip_search else [], bfloat16)


def _choose(
    weight: Tensor, group_size: int | None, bits: int, symmetric: bool, shrink: list[float], bfloat16: bool
) -> tuple[Tensor, Tensor]:
    """`choose_qparams` with the shrinkages to search; none: the range as it is."""
    group_size = group_size or weight.shape[-1]
    groups = weight.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1).clamp_max(0).float(), groups.amax(-1).clamp_min(0).float()
    if not shrink or weight.is_meta:  # a search changes no shape
        return qparams(low, high, bits, symmetric, bfloat16)
    shape = low.shape
    rows = groups.reshape(-1, group_size).float()
    best = torch.cat(
        [
            _search(part, lo, hi, bits, symmetric, shrink, bfloat16)
            for part, lo, hi in zip(
                *(t.split(max(1, _BLOCK // group_size)) for t in (rows, low.reshape(-1), high.reshape(-1))),
                strict=True,
            )
        ]
    ).reshape(shape)
    return qparams(low * best, high * best, bits, symmetric, bfloat16)


def qparams(
    low: Tensor, high: Tensor, bits: int, symmetric: bool, bfloat16: bool = False
) -> tuple[Tensor, Tensor]:
    """The scale and zero point of ranges [low, high], low <= 0 <= high."""
    first, last = limits(bits, symmetric)
    scale = torch.maximum(-low, high) / last if symmetric else (high - low) / (last - first)
    scale = scale.clamp_min(EPSILON)
    if bfloat16:
        scale = scale.bfloat16().float()
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    return scale, (first - torch.round(low / scale)).clamp(first, last).to(torch.int8)


def _search(
    rows: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    symmetric: bool,
    shrinkages: list[float],
    bfloat16: bool,
) -> Tensor:
    """The shrinkage [r] of each row of [r, group]'s range that loses least."""
    best = torch.full_like(low, float("inf"))
    chosen = torch.ones_like(low)
    for shrink in shrinkages:
        scale, zero = qparams(low * shrink, high * shrink, bits, symmetric, bfloat16)
        loss = rows - round_trip(rows, scale.unsqueeze(-1), zero.unsqueeze(-1), bits, symmetric)
        total = loss.abs_().pow_(_NORM).sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        chosen = torch.where(better, shrink, chosen)
    return chosen


def round_trip(x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Tensor:
    """x on its grid: s·(clamp(round(x/s) + z) - z), for scale and zero point that broadcast over x."""
    first, last = limits(bits, symmetric)
    steps: Tensor = (x * (1 / scale)).round_()
    if symmetric:
        return steps.clamp_(first, last).mul_(scale)
    shift = zero.to(x.dtype)
    return steps.add_(shift).clamp_(first, last).sub_(shift).mul_(scale)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool = True) -> Tensor:
    """The integers of a weight [..., n] on the grids of its groups: int8 [..., n]."""
    first, last = limits(bits, symmetric)

    def integers(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        steps: Tensor = (groups * (1 / scale.to(groups.dtype))).round_()
        steps = steps if symmetric else steps.add_(zero)
        return steps.clamp_(first, last).to(torch.int8)

    group = weight.shape[-1] // scale.shape[-1]
    known = weight.reshape(-1, group), scale.reshape(-1, 1), zero.reshape(-1, 1)
    if weight.numel() <= _BLOCK or weight.is_meta:
        return integers(*known).view(weight.shape)
    parts = zip(*(t.split(max(1, _BLOCK // group)) for t in known), strict=True)
    return torch.cat([integers(*part) for part in parts]).view(weight.shape)


def dequantize(integers: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """s·(q - z) in the scales' type, for integers [..., n] and scales and zero points [..., groups]."""
    groups: Tensor = integers.unflatten(-1, (scale.shape[-1], -1)).to(scale.dtype)
    if zero is not None:
        groups = groups - zero.unsqueeze(-1)
    return (groups * scale.unsqueeze(-1)).flatten(-2)


def fake_quantize(
    x: Tensor, bits: int, group_size: int | None = None, symmetric: bool = False, clip: float = 1.0
) -> Tensor:
    """x on a grid chosen from its own range, per token or per group of its last axis.

    The range, max|x| (symmetric) or [min(x, 0), max(x, 0)], is multiplied by `clip`. Gradients pass
    straight through, outside the range too.
    """
    result: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
        x, bits, group_size or x.shape[-1], symmetric, clip
    )
    return result


def fake_quantize_static(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool = False
) -> Tensor:
    """x on a grid given by scale and zero point that broadcast over it; gradients pass straight through."""
    with torch.no_grad():
        rounded = round_trip(x, scale.to(x.dtype), zero, bits, symmetric)
    return rounded if not x.requires_grad else x + (rounded - x).detach()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bits: int, group: int, symmetric: bool, clip: float) -> Tensor:  # type: ignore[no-untyped-def]
        groups = x.unflatten(-1, (-1, group))
        low, high = groups.amin(-1, True), groups.amax(-1, True)  # both in less than aminmax takes
        range_ = low.clamp_max_(0).mul_(clip), high.clamp_min_(0).mul_(clip)
        return round_trip(groups, *qparams(*range_, bits, symmetric), bits, symmetric).flatten(-2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[no-untyped-def]
        return gradient, None, None, None, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """A value computed from x by rounding; its gradient goes to x unchanged (Bengio et al., 2013)."""
    result: Tensor = _As.apply(x, value)  # type: ignore[no-untyped-call]
    return result


def fake_quantize_weight(
    weight: Tensor,
    group_size: int | None,
    bits: int,
    symmetric: bool = True,
    clip_search: bool = False,
    bfloat16: bool = False,
) -> Tensor:
    """A weight on its grid, for training: as `choose_qparams` and `round_trip`, gradients straight through.

    A clip search is one of 8 ranges, in place of 80: every step makes one for every weight.
    """
    with torch.no_grad():
        shrink = _SHRINK_COARSE if clip_search else []
        scale, zero = _choose(weight, group_size, bits, symmetric, shrink, bfloat16)
        rounded = _on_grid(weight, scale, zero, bits, symmetric)
    return straight_through(weight, rounded)


def _on_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Tensor:
    """A weight [..., n] on the grids of its groups, float32."""
    groups = weight.float().unflatten(-1, (scale.shape[-1], -1))
    return round_trip(groups, scale.unsqueeze(-1), zero.unsqueeze(-1), bits, symmetric).flatten(-2)


class _As(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.dtype = x.dtype
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient.to(ctx.dtype), None


old_names(globals())
