"""Kinds of models that are captured: what each takes, and whether its attention is causal."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rolora_passes.errors import CaptureError
from rolora_passes.extras import require
from rolora_passes.graphs.inputs import DECODER, ENCODER, ENCODER_DECODER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEYWORDS = {"tokens": "input_ids", "positions": "position_ids", "decoder_tokens": "decoder_input_ids"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What kind of model it is: its inputs, and whether its attention must be causal (None: some is)."""

    inputs: tuple[str, ...]
    causal: bool | None
    options: dict[str, Any]

    def call(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """The model's logits, or its last hidden state."""
        output = model(**{_KEYWORDS[name]: value for name, value in inputs.items()}, **self.options)
        result = getattr(output, "logits", getattr(output, "last_hidden_state", None))
        if not isinstance(result, Tensor):
            raise CaptureError(
                f"expected logits or a last hidden state from {type(model).__name__}, "
                f"found {', '.join(output)}; load it with another head"
            )
        return result


_DECODER = Kind(DECODER, True, {"use_cache": False})
_ENCODER = Kind(ENCODER, False, {})
_ENCODER_DECODER = Kind(ENCODER_DECODER, None, {"use_cache": False})


def kind_of(model: object) -> Kind:
    """What kind a model is.

    Raises:
        CaptureError: not a model of text.
    """
    transformers = require("transformers", "transformers")
    name = type(model).__name__
    if not isinstance(model, transformers.PreTrainedModel):
        raise CaptureError(
            f"expected a transformers model of text, found {name}; "
            "load it with transformers.AutoModelForCausalLM, or the class of its own head"
        )
    if model.main_input_name != "input_ids":
        raise CaptureError(f"expected a model of text, found {name}, which takes {model.main_input_name}")
    if getattr(model.config, "is_encoder_decoder", False):
        return _ENCODER_DECODER
    return _DECODER if model.can_generate() and model.get_output_embeddings() is not None else _ENCODER
