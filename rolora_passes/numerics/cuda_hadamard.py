"""The transform by `fast_hadamard_transform` (Dao-AILab), a CUDA kernel, where it is installed.

The kernel multiplies rows of 2^m by Sylvester's matrix, in one read and one write. An order K·2^m is that and
a product with H_K; the kernel's own functions for such orders have matrices of other constructions than ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rolora_passes.numerics.constructions import Construction

_POWERS = range(3, 16)  # 8 to 32768: what the kernel takes as it is
_KIND = "cuda"
_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(x: Tensor, m: int, right: int) -> bool:
    """Whether the kernel computes a transform of K·2^m.

    Args:
        x: what to transform.
        right: elements of x behind the axis, or its factor, that is transformed.
    """
    there = x.device.type == _KIND and x.dtype in _TYPES and right == 1 and m in _POWERS
    return there and _kernel() is not None


def transform(rows: Tensor, base: Construction, m: int) -> Tensor:
    """Rows [n, K·2^m] times matrix(K·2^m) / sqrt(K·2^m), in their own type; computed in float32."""
    kernel, k = _kernel(), base.order
    assert kernel is not None
    wide = rows.contiguous() if k == 1 else rows.float()
    turned = kernel(wide.reshape(-1, 1 << m), 1 / math.sqrt(k << m)).reshape(len(rows), k, 1 << m)
    if k > 1:
        turned = torch.matmul(_signs(base, rows.device).T, turned)
    return turned.reshape(rows.shape).to(rows.dtype)


@functools.cache
def _kernel() -> Callable[[Tensor, float], Tensor] | None:
    """The kernel; None where it is not installed, or is built for another torch."""
    try:
        from fast_hadamard_transform import hadamard_transform
    except ImportError:
        return None
    return hadamard_transform  # type: ignore[no-any-return]


@functools.cache
def _signs(base: Construction, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(base.build(), dtype=torch.float32).to(device)
