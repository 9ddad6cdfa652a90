"""A model in half precision, computed in float32 without a copy of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode


class InFloat32(TorchFunctionMode):
    """Within it, every operator that is given values or types of half precision has them in float32.

    A parameter is cast when it is read, and kept no longer.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("__get__", "__set__"):  # x.dtype, x.shape: nothing is computed
            return func(*args, **(kwargs or {}))
        args, kwargs = fx.node.map_aggregate((args, dict(kwargs or {})), _widened)
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
        return value.detach().to(torch.float32)
    half = isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize < 4
    return torch.float32 if half else value
