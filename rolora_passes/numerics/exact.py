"""Float64 where a device has it, and on the CPU for one that has not (MPS)."""

from __future__ import annotations

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = {"mps"}


def has_type(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device computes in a type."""
    return device.type not in _WITHOUT_FLOAT64 or dtype != torch.float64


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is computed of what lies on a device."""
    return device if has_type(device, torch.float64) else torch.device("cpu")


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the CPU if its device has no float64."""
    return tensor.to(exact_device(tensor.device), torch.float64)
