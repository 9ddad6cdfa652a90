"""4-bit integers, two to a byte: what every runtime stores, and none stores quite like another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 1 << 18  # pairs packed at a time: what stays in the caches


def pack_nibbles(integers: Tensor, high_first: bool = False) -> Tensor:
    """The low halves of bytes, neighbours along the last axis sharing one.

    A signed integer leaves its two's complement; what stores value + 8 takes this `^ 0x88`.

    Args:
        integers: int8 or uint8 [..., n], any device; an odd n is filled up with 0.
        high_first: put the first of two in the high half, not in the low one.

    Returns: uint8 [..., ceil(n / 2)].
    """
    if integers.shape[-1] % 2:
        integers = F.pad(integers, (0, 1))
    flat = integers.reshape(-1).contiguous()
    flat = flat.clone() if flat.storage_offset() % 2 else flat
    first, second = (4, 8) if high_first else (0, 4)
    packed = torch.empty(len(flat) // 2, dtype=torch.uint8, device=flat.device)
    # As pairs, the first in the low byte: whole registers, and no strides.
    for pairs, target in zip(flat.view(torch.int16).split(_BLOCK), packed.split(_BLOCK), strict=True):
        halves = pairs & 0x0F0F
        target.copy_((halves << first).bitwise_or_(halves >> second))
    return packed.view(*integers.shape[:-1], integers.shape[-1] // 2)
