"""Checkpoints whose weights stay in their files, and models that know the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rolora_passes.loading.checkpoint import tensor_files, tensors_of
from rolora_passes.ondisk import on_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stored:
    """A model whose parameters are memory without values.

    Attributes:
        model: its buffers have their values.
        weights: what its parameters are, by name: mapped from the files, in the files' types.
        info: transformers' loading info.
    """

    model: PreTrainedModel
    weights: dict[str, Tensor]
    info: dict[str, Any]


def load_stored(folder: Path, dtype: torch.dtype) -> Stored | None:
    """The model of a folder of safetensors, without reading its weights.

    transformers loads tensors of the right shapes that have no values yet: they take no memory until somebody
    writes to them. Which of them a parameter has become says which tensor of the files it is.

    Args:
        dtype: of the model's parameters.

    Returns: None if the files are no safetensors, or transformers makes one parameter of several tensors
        (experts that are stacked): then the model has to be loaded whole.
    """
    import transformers

    files = tensor_files(folder)
    if not files or any(path.suffix != ".safetensors" for path in files):
        return None
    tensors = {name: on_disk(value, path) for path in files for name, value in tensors_of(path).items()}
    hollow = {name: _hollow(value, dtype) for name, value in tensors.items()}
    config = transformers.AutoConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        kind: Any = type(transformers.AutoModelForCausalLM.from_config(config))
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(hollow),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    names = {value.data_ptr(): name for name, value in hollow.items()}
    weights = dict[str, Tensor]()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        source = names.get(value.data_ptr())
        if source is not None and value.shape == tensors[source].shape:
            weights[name] = tensors[source]
    if info["missing_keys"] or info["mismatched_keys"]:
        return Stored(model, weights, info)  # which is refused
    if not weights.keys() >= {name for name, _ in model.named_parameters()}:
        return None
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights.pop(name))
    return Stored(model, weights, info)


def _hollow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the same shape without values."""
    return torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
