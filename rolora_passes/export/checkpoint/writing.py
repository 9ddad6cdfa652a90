"""Write the weights of a checkpoint, one at a time, in files of a bounded size with their index."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rolora_passes.export.checkpoint.plan import Plan
from rolora_passes.memory import release
from rolora_passes.tensor_files import size, write_tensors


def write_weights(
    plan: Plan, folder: Path, shard_size: int, on_progress: Callable[[str, int, int], None]
) -> dict[str, int]:
    """Write `model.safetensors`, or several files and `model.safetensors.index.json`, as transformers does.

    Args:
        shard_size: bytes of tensors in a file; a larger tensor has a file of its own.
        on_progress: called with what is counted, how many tensors are written, and of how many.

    Returns: a check sum for every tensor of the model's state, see `check_sum`.

    Raises:
        LoweringError: what `Plan.value` raises.
        OSError: a file cannot be written.
    """
    maker, shards = _Maker(plan, on_progress), _shards(plan, shard_size)
    files = dict[str, str]()
    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
        forms = {name: plan.forms[name] for name in names}
        write_tensors(folder / file, forms, maker.part, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(map(size, plan.forms.values()))
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    return maker.sums


def check_sum(value: Tensor, dtype: torch.dtype) -> int:
    """Of all bits of a tensor in a type; integers keep their own."""
    value = value.detach().to(dtype) if value.is_floating_point() else value
    return zlib.crc32(value.contiguous().view(-1).view(torch.uint8).numpy().data) if value.numel() else 0


class _Maker:
    """Gives the files' tensors; of those that are parts of one of the model's, that one is made once."""

    def __init__(self, plan: Plan, on_progress: Callable[[str, int, int], None]) -> None:
        self.plan, self.sums = plan, dict[str, int]()
        self._tell = on_progress
        self._parts = dict[str, Tensor]()

    def part(self, name: str) -> Tensor:
        if name not in self._parts:
            owner = self.plan.owners[name]
            value = self.plan.value(owner).contiguous()
            self.sums[owner] = check_sum(value, self.plan.type)
            self._parts = self.plan.origin.in_files(owner, value)
            if len(self.sums) % 8 == 0:
                release()
            self._tell("tensors", len(self.sums), len({*self.plan.owners.values()}))
        return self._parts.pop(name)


def _shards(plan: Plan, limit: int) -> list[list[str]]:
    """The files' tensors in order, as many in each file as its size lets be."""
    shards, held = [list[str]()], 0
    for name, form in plan.forms.items():
        if shards[-1] and held + size(form) > limit:
            shards, held = [*shards, []], 0
        shards[-1].append(name)
        held += size(form)
    return shards
