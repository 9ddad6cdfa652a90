"""One loop for one process or many: what differs when torchrun started it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from rolora_passes.learning.layered import LayeredGraph


def join() -> None:
    """Join the other processes, if torchrun started this one: NCCL for what is on a GPU, gloo for the rest.

    torch takes the one or the other by where a tensor is.
    """
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        both = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo")


def rank() -> int:
    """This process's number, 0 if it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def synchronised(module: nn.Module) -> Callable[[], list[Tensor]]:
    """The module as all processes hold it: its gradients are their mean."""
    if count() == 1:
        return module
    return cast(Callable[[], list[Tensor]], DistributedDataParallel(module, broadcast_buffers=False))


def mean(value: Tensor) -> float:
    """The mean of a number over the processes."""
    if count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return float(value) / count()


def from_first(value: Any) -> Any:
    """What the first process has, in all of them: files may be on its machine alone."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def shard(graph: LayeredGraph) -> None:
    """Divide every layer's weights between the processes (FSDP2); they meet while the layer is computed."""
    from torch.distributed.fsdp import fully_shard  # takes as long to import as all of torch

    graph.settle()
    mesh = init_device_mesh(graph.device.type, (count(),))
    for layer in graph.layers:
        fully_shard(layer, mesh=mesh)
