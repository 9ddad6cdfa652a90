"""The model that a checkpoint is of: its graph, its modules without weights, and the form of its files."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import parameter_names
from rolora_passes.graphs.info import info
from rolora_passes.loading.checkpoint import stored_types
from rolora_passes.loading.models import load_outlined, source_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Origin:
    """A model of transformers, as it was before the passes.

    Attributes:
        source: its folder, hub name, or `.gguf` file.
        graph: as it was captured.
        outline: the model on the meta device, with its configuration.
        tokenizer: the model's.
        unread: what the model's state holds, and its graph does not read.
        types: those of its files' tensors, by their names there; empty for a GGUF file.
    """

    source: str
    graph: fx.GraphModule
    outline: PreTrainedModel
    tokenizer: Any
    unread: Mapping[str, Tensor]
    types: Mapping[str, torch.dtype]

    @classmethod
    def load(cls, source: str, dtype: torch.dtype = torch.float32) -> Origin:
        """Load and capture a model.

        Args:
            dtype: of the graph. The files' own types are kept in `types`.

        Raises:
            CaptureError: what `load_model` and `capture` raise.
        """
        model, tokenizer, weights = load_outlined(source, dtype)
        graph = capture(model, weights=weights)
        read = parameter_names(graph) | {*info(graph).tied}
        state = {**model.state_dict(), **weights}
        unread = {name: value for name, value in state.items() if name not in read}
        folder = source_folder(source)
        types = {} if folder is None else stored_types(folder)
        return cls(source, graph, _outline(model, model.config), tokenizer, unread, types)

    @property
    def type(self) -> torch.dtype:
        """The type of most of its files' tensors; float32 for a GGUF, whose weights are dequantized."""
        counts = Counter(self.types.values())
        return counts.most_common(1)[0][0] if counts else torch.float32

    @property
    def names(self) -> tuple[str, str]:
        """What the model calls its table, and its head."""
        table, head = self.outline.get_input_embeddings(), self.outline.get_output_embeddings()
        called = {module: name for name, module in self.outline.named_modules(remove_duplicate=False)}
        return f"{called[table]}.weight", f"{called[head]}.weight"

    def untied(self) -> Origin:
        """The same with a head that has its own table."""
        config = copy.deepcopy(self.outline.config)
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        return replace(self, outline=_outline(self.outline, config))

    def in_files(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A tensor of the model's state as its files hold it: under another name, or in parts, if they do."""
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, Tensor] = revert_weight_conversion(self.outline, {name: value})
        return found

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors on the meta device that its files hold, in the model's order; a tied one once."""
        tied = {*info(self.graph).tied, *info(self.graph).tied.values()} - {self.names[0]}
        shared = self.outline.get_output_embeddings().weight is self.outline.get_input_embeddings().weight
        for name, value in self.outline.state_dict().items():
            if not (shared and name in tied):
                yield name, value


def _outline(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        found = type(model)(copy.deepcopy(config))
    found.generation_config = model.generation_config
    return found.eval()
