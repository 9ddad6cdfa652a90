"""A device that every machine has: its tensors are the CPU's, and torch refuses to mix the two.

torch lets Python be a backend (PrivateUse1). A tensor of this one holds a tensor of the CPU, on which every
operator is computed: values are real, `item()` and gradients included. A tensor of the CPU that meets one of
the device raises `StrayTensor`. As on CUDA, only numbers without dimensions may meet.

(Fake tensors of a CUDA device would not do: where torch is built without CUDA they cannot be indexed, and a
gradient of one ends the process.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "simulated"
_aten = torch.ops.aten
_MOVES = (_aten.copy_.default, _aten._to_copy.default)
_missing: set[torch.dtype] = set()


class StrayTensor(RuntimeError):
    """A tensor of the CPU where one of the device was expected."""


class _OnDevice(Tensor):
    """A tensor of the device; `held` is its values, a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnDevice:
        known: dict[str, Any] = {"dtype": held.dtype, "layout": held.layout, "device": DEVICE}
        if held.dtype in _missing:
            raise TypeError(f"the device has no {held.dtype}")
        made: _OnDevice = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), **known
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, *args, **(kwargs or {}))


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operator gives, computed on the CPU."""

    def held(value: Any) -> Any:
        if isinstance(value, _OnDevice):
            return value.held
        if isinstance(value, Tensor) and value.dim() and func not in _MOVES:
            raise StrayTensor(f"{func} meets a tensor {list(value.shape)} of the {value.device}")
        return torch.device("cpu") if isinstance(value, torch.device) else value

    found = func(*pytree.tree_map(held, args), **pytree.tree_map(held, kwargs))
    target = kwargs.get("device")
    if target is not None and torch.device(target).type == "cpu":
        return found
    if func._schema.is_mutable:  # it wrote into what it was given
        return kwargs.get("out", args[0])
    return pytree.tree_map(lambda v: _OnDevice(v) if isinstance(v, Tensor) else v, found)


class _Backend:
    """What torch asks of a device's module."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)
_every = torch.library.Library("_", "IMPL", "PrivateUse1")
_every.fallback(_compute)
_cast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_cast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_own = torch.library.Library("aten", "IMPL", "PrivateUse1")  # `torch.tensor(…, device=…)` finds no fallback
_own.impl("_to_copy", partial(_compute, _aten._to_copy.default))


@contextmanager
def without(*dtypes: torch.dtype) -> Iterator[None]:
    """The device lacks these types, as MPS lacks float64."""
    _missing.update(dtypes)
    try:
        yield
    finally:
        _missing.difference_update(dtypes)
