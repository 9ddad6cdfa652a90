"""Arrays for the page, one byte per element: enough for pictures, and a tenth of the size of text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_WIDEST = 1e4  # the largest ratio of the ends of a logarithmic scale


class Arrays:
    """Many arrays in one block of bytes, with a description of each for the reader.

    Code c of 0 .. 255 stands for low + c/255·(high - low), or, on a logarithmic scale, for
    low·(high/low)^(c/255).
    """

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __bytes__(self) -> bytes:
        return bytes(self._bytes)

    def linear(self, values: Tensor, high: float) -> dict[str, Any]:
        """Values from 0 to `high`, any shape."""
        return self._add(values / (high or 1.0), values.shape, low=0.0, high=high, log=False)

    def logarithmic(self, values: Tensor, low: float, high: float) -> dict[str, Any]:
        """Values from `low` > 0 to `high` > `low`, any shape; smaller ones are shown as `low`."""
        parts = (values.double().clamp(low, high) / low).log() / math.log(high / low)
        return self._add(parts, values.shape, low=low, high=high, log=True)

    def _add(self, parts: Tensor, shape: torch.Size, **scale: Any) -> dict[str, Any]:
        codes = (parts * 255).round().nan_to_num(nan=0.0).clamp(0, 255).to(torch.uint8).cpu()
        place = len(self._bytes)
        self._bytes += codes.contiguous().numpy().tobytes()
        return {"at": place, "shape": list(shape), **scale}


def bounds(values: Tensor, below: float = 0.0) -> tuple[float, float]:
    """(low, high) of a logarithmic scale for magnitudes: up to the largest, over four decades at most.

    `below` is the share of the values that may be too small for the scale.
    """
    finite = values[values.isfinite()].double()
    high = float(finite.max()) if finite.numel() else 0.0
    if high <= 0:
        return 1e-4, 1.0
    low = float(finite.kthvalue(1 + int(below * (finite.numel() - 1))).values)
    return min(max(low, high / _WIDEST), high / 1.01), high
