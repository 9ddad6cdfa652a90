"""Programs are lowered from tensors of the CPU, wherever a graph is and is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from torch import fx

from rolora_passes.graphs.devices import computing_on, device_of
from rolora_passes.graphs.dtypes import to_device

_P = ParamSpec("_P")
_R = TypeVar("_R")


def from_cpu(lower: Callable[_P, _R]) -> Callable[_P, _R]:
    """A lowering that is given graphs on the CPU, and computes there."""

    @functools.wraps(lower)
    def lowered(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with computing_on("cpu"):
            return lower(*map(_moved, args), **{name: _moved(value) for name, value in kwargs.items()})

    return lowered


def _moved(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(one) for name, one in value.items()}
    away = isinstance(value, fx.GraphModule) and device_of(value).type != "cpu"
    return to_device(value, "cpu") if away else value
