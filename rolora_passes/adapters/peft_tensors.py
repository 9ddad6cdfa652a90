"""The tensors of an adapter as PEFT names them: branches, whole parameters, and rows of embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rolora_passes.errors import PassError, one_line

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MERGE = "merge it with PEFT first (model.merge_and_unload()) and capture what that gives"
PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
_ROWS = ".token_adapter.trainable_tokens_delta"
# What PEFT saves of a module twice where an embedding was resized, and has no use for: what it trained whole,
# and what that was before.
_COPY = re.compile(r"(.+)\.(?P<kind>modules_to_save|original_module)\.([^.]+)")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an adapter's file by name, each of a floating-point type and finite.

    Raises:
        PassError: no such file, a damaged one, or a tensor that is not so.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        older = (folder / "adapter_model.bin").is_file()
        found = "adapter_model.bin, which can run code when it is read" if older else "none"
        raise PassError(
            f"expected {WEIGHTS} in {folder}, found {found}; load the adapter in PEFT and save it as "
            "safetensors"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise PassError(f"{path} is damaged: {one_line(error)}") from error
    if not tensors:
        raise PassError(f"{path}: expected an adapter's tensors, found none")
    for name, value in tensors.items():
        if value.dtype not in _FLOATS or value.numel() == 0:
            found = f"{value.dtype}, {list(value.shape)}"
            raise PassError(f"{path}: expected {name!r:.120} in floating point, found {found}")
        if not bool(value.isfinite().all()):
            raise PassError(f"{path}: {name!r:.120} holds values that are NaN or infinite")
    return tensors


def sort_tensors(
    folder: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Parts of branches by module, whole parameters by name, and rows of embeddings by module.

    Raises:
        PassError: a tensor with another name than PEFT gives.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others, rows, replaced = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        part = next((p for p in PARTS if name.endswith(f".{p}")), None)
        if part is not None:
            parts.setdefault(name.removesuffix(f".{part}"), {})[part] = value
        elif name.endswith(_ROWS):
            rows[name.removesuffix(_ROWS)] = value
        elif not key.startswith(PREFIX) or "lora_" in name:
            expected = f"tensors that end in {', '.join(PARTS)}, or parameters of the base"
            raise PassError(f"{folder}: expected {expected}, found {key!r:.160}; {MERGE}")
        else:
            others[name] = value
    copies = {name: found for name in others if (found := _COPY.fullmatch(name))}
    for name, value in others.items():
        owner, _, leaf = name.rpartition(".")
        module = owner.removesuffix(".base_layer").removesuffix(".token_adapter")
        # PEFT knows the parameters of a module that it wraps as those of its base layer, and ignores others.
        wrapper = ".token_adapter.base_layer" if module in rows else ".base_layer" if module in parts else ""
        if owner != module + wrapper:
            raise PassError(f"{folder}: {name!r:.160} is a name by which PEFT would not find it; {MERGE}")
        if name not in copies:
            replaced[f"{module}.{leaf}"] = value
    for name, found in copies.items():
        _require_copy(folder, name, others[name], found["kind"], replaced.get(f"{found[1]}.{found[3]}"))
    return parts, replaced, rows


def _require_copy(folder: Path, name: str, value: Tensor, kind: str, own: Tensor | None) -> None:
    """That what is saved beside a whole parameter is what PEFT saves there: without effect."""
    same = own is not None and own.shape == value.shape
    if own is None or not same or (kind == "modules_to_save" and not torch.equal(own, value)):
        raise PassError(
            f"{folder}: {name!r:.160} is not a copy beside the module's own tensor: save the adapter with "
            f"model.save_pretrained(folder, save_embedding_layers=False), or {MERGE}"
        )
