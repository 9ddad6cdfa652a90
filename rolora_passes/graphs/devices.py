"""Where a graph is computed: where its tensors are, or on a device that they travel to one at a time.

    with computing_on("cuda"):
        run(graph, tokens)      # the graph's tensors stay in the machine's memory, or on its disk

A tensor is copied to the device when something reads it. While there is room the copy stays, so that a model
that fits is moved once; of a larger one the rest is moved again whenever it is read. What a pass adds to a
graph lies where the graph's tensors do (`rolora_passes.graphs.graph.add_parameter`).

MPS has no float64: what is computed in it (folding, verification) is computed on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from rolora_passes.errors import DeviceError
from rolora_passes.numerics.exact import has_type

Device = str | torch.device
"""A device's name, "auto" for the best there is, or a torch.device."""
_CPU = torch.device("cpu")
# Of what is free on a device, the part that copies of tensors may take: the rest is for computing.
_PART = 0.5


def find_device(name: Device) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", "mps", or "auto", the best there is.

    "cuda" is the current one, and under torchrun each process's own (LOCAL_RANK).

    Raises:
        DeviceError: torch has no such device here; says which it has.
    """
    best = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        name = best or _CPU
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"expected a device ({_names(best)}, auto), found {name!r}") from error
    if device.type == "cpu":
        return _CPU
    if best is None or device.type != best.type:
        why = "finds no such hardware, or no driver" if _built(device.type) else "is built without it"
        known = f"expected a device that torch has here ({_names(best)})"
        raise DeviceError(f"{known}, found {device}: torch {why}; give one of these, or auto")
    index = device.index
    if index is None:
        own = os.environ.get("LOCAL_RANK")  # torchrun's
        index = torch.accelerator.current_device_index() if own is None else int(own)
    if index >= torch.accelerator.device_count():
        raise DeviceError(
            f"expected a device that torch has here ({_names(best)}), found {device.type}:{index}"
        )
    return torch.device(device.type, index)


def _names(best: torch.device | None) -> str:
    count = 0 if best is None else torch.accelerator.device_count()
    return ", ".join(["cpu", *(f"{best.type}:{i}" for i in range(count) if best is not None)])


def _built(kind: str) -> bool:
    backend = getattr(torch.backends, kind, None)
    return bool(backend is not None and hasattr(backend, "is_built") and backend.is_built())


class Place:
    """A device, and the copies that are kept there of tensors that lie elsewhere.

    Attributes:
        device: where to compute.
    """

    def __init__(self, device: torch.device, room: float) -> None:
        """Args:
        room: bytes that copies may take there.
        """
        self.device, self._room = device, room
        self._kept = WeakTensorKeyDictionary()

    def fetch(self, tensor: Tensor) -> Tensor:
        """A tensor on the device: a copy, that of before if it was kept. Nobody may write into it."""
        if tensor.device == self.device:
            return tensor
        if (known := self._kept.get(tensor)) is not None:
            return known  # type: ignore[no-any-return]
        copy = moved_to(tensor.detach(), self.device)
        if copy.nbytes + sum(kept.nbytes for kept in self._kept.values()) <= self._room:
            self._kept[tensor] = copy
        return copy


def _free(device: torch.device) -> float:
    """Bytes that are free on a device; no limit where torch does not say."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    module: Any = torch.get_device_module(device)
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else float("inf")


_place: ContextVar[Place | None] = ContextVar("place", default=None)


@contextmanager
def computing_on(device: Device | None) -> Iterator[None]:
    """Compute graphs on a device, wherever their tensors are; None changes nothing.

    Copies that the device keeps are let go at the end.

    Raises:
        DeviceError: see `find_device`.
    """
    place, wanted = _place.get(), None if device is None else find_device(device)
    if wanted is None or (place is not None and place.device == wanted):
        yield
        return
    token = _place.set(Place(wanted, _PART * _free(wanted)))
    try:
        yield
    finally:
        _place.reset(token)


def device_of(graph: fx.GraphModule) -> torch.device:
    """Where the tensors of a graph are: the first of them, for they are in one place."""
    first = next(chain(graph.parameters(), graph.buffers()), None)
    return _CPU if first is None else first.device


def place_of(graph: fx.GraphModule, dtype: torch.dtype | None = None) -> Place:
    """Where a graph is computed, in this type if one is given."""
    place = _place.get() or Place(device_of(graph), 0)
    return place if dtype is None or has_type(place.device, dtype) else Place(_CPU, 0)


def moved_to(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor, or a parameter, on a device: itself, if it is there; in float32, if its type is not."""
    if tensor.device == device:
        return tensor
    value = tensor.detach()
    value = (value if has_type(device, value.dtype) else value.float()).to(device)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself, not by emulating it."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from here on, on the CPU and on a device; afterwards both draw what they would have drawn."""
    indices = [] if device.type in ("cpu", "mps") else [device.index or 0]  # torch cannot restore MPS's
    with torch.random.fork_rng(indices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


def written_for(value: Any, device: torch.device) -> Any:
    """A node's arguments with every device that is written in them (`arange(…, device=…)`) changed."""
    return fx.node.map_aggregate(value, lambda v: device if isinstance(v, torch.device) else v)
