"""Half precision, computed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def widened(value: Any) -> Any:
    """A tensor of half precision in float32, and that type in place of it; all else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
        return value.detach().to(torch.float32)
    half = isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize < 4
    return torch.float32 if half else value
