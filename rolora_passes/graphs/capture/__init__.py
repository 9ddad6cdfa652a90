"""Capture a transformers model once, without a cache, into canonical form.

What a graph takes (`graphs.inputs`) depends on the kind of model. A decoder with its language-model head
gets its positions; an encoder, and an encoder with a decoder, count their own. The result is the logits
where the model has a head, else the last hidden state. Rows are unpadded: there is no padding mask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from rolora_passes.errors import CaptureError, one_line
from rolora_passes.graphs import operators as _operators  # noqa: F401  (registers the operators)
from rolora_passes.graphs.capture.attention import one_node_attention, static_experts
from rolora_passes.graphs.capture.canonical import canonicalize
from rolora_passes.graphs.capture.checking import compare, compare_exported, ropes
from rolora_passes.graphs.capture.kinds import Kind, kind_of
from rolora_passes.graphs.capture.masks import Masks
from rolora_passes.graphs.capture.stored import put_stored, stored_for
from rolora_passes.graphs.identity import remember_weights
from rolora_passes.graphs.info import set_info
from rolora_passes.graphs.inputs import positions_like
from rolora_passes.graphs.sources import raised_at
from rolora_passes.moved import old_names
from rolora_passes.ondisk import rest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONFIG_KEYS = ("vocab_size", "hidden_size", "max_position_embeddings", "model_type")
# Rotary embeddings whose frequencies depend on the length of the text.
_CHANGING = ("dynamic",)
# Attention functions are registered for the whole process, and torch.export is not made for threads.
_one_at_a_time = threading.Lock()


def capture(
    model: PreTrainedModel, *, check: bool = True, weights: Mapping[str, Tensor] | None = None
) -> fx.GraphModule:
    """Capture a language model as `forward(tokens, positions) -> logits` in canonical form.

    Tokens and positions are int64 [B, S], both dimensions dynamic; logits are [B, S, V]. An encoder becomes
    `forward(tokens) -> what its head gives`, or its last hidden state [B, S, d] if it has none; an encoder
    with a decoder `forward(tokens, decoder_tokens [B, T]) -> logits [B, T, V]`. Parameters keep their names
    and are shared with the model, not copied; the graph is on the model's device.

    Args:
        model: a transformers model of text, in eval mode or not (dropout is off).
        check: run graph and model once on two rows of random tokens and compare, in float32 if the model is
            narrower. 12 tokens a row, or as many as show every window of up to 78.
        weights: what the model's parameters are, by name, where they have no values themselves
            (`loading.models.load_outlined`). They may be of another type, in which they stay: the graph casts
            what it reads.

    Raises:
        CaptureError: not a model of text, or a decoder without its head; weights that are NaN or infinite;
            attention that is not (optionally windowed, soft-capped) softmax attention, causal in a decoder;
            a graph that does not agree.
    """
    kind = kind_of(model)
    held = dict(model.named_parameters())
    _require_finite({**held, **(weights or {})})
    stored = stored_for(model, weights or {})
    _require_fixed_angles(model)
    with _one_at_a_time, _evaluating(model):
        exported = _export(model, kind)
        graph = canonicalize(exported.module(check_guards=False))
        set_info(graph, config=_config(model))
        remember_weights(graph, exported.state_dict, stored)
        put_stored(graph, stored)
        if check:
            compare(graph, model, kind, stored)
    return graph


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Every module in eval mode; afterwards in the mode that it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def from_exported(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """Canonical form of an ExportedProgram whose forward takes what `graphs.inputs` names, to one tensor.

    Raises:
        CaptureError: it takes or returns something else, or the graph does not compute what the program does.
    """
    graph = canonicalize(exported.module(check_guards=False))
    remember_weights(graph, exported.state_dict)
    if exported.example_inputs is not None:
        compare_exported(graph, exported)
    return graph


class _Forward(nn.Module):
    """A model under the names that graphs give its inputs."""

    def __init__(self, model: PreTrainedModel, kind: Kind) -> None:
        super().__init__()
        self.model = model
        self.kind = kind

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, decoder_tokens: Tensor | None = None
    ) -> Tensor:
        given = {"tokens": tokens, "positions": positions, "decoder_tokens": decoder_tokens}
        return self.kind.call(self.model, {k: v for k, v in given.items() if v is not None})


def _export(model: PreTrainedModel, kind: Kind) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    tokens = torch.zeros(2, 6, dtype=torch.int64, device=model.device)  # a batch of 1 would be specialised
    samples = {
        "tokens": tokens,
        "positions": positions_like(tokens),
        "decoder_tokens": tokens[:, :5].clone(),  # a tensor given twice would be one input
    }
    given = {name: samples[name] for name in kind.inputs}
    shapes = {name: {0: auto, 1: auto} for name in given}
    masks = Masks()
    try:
        own_attention = one_node_attention(model, kind, masks)
        with torch.no_grad(), _same_attributes(model), static_experts(model), own_attention:
            forward = _Forward(model, kind)
            forward(**given)  # what masks say can be read of values alone
            masks.replay()
            return torch.export.export(forward, (), given, dynamic_shapes=shapes, strict=False)
    except (CaptureError, MemoryError):
        raise
    except Exception as error:  # whatever the model's own code does with what it is given
        if "DataDependent" in type(error).__name__:
            raise CaptureError(
                f"{type(model).__name__} in {model.dtype} branches on the values it computes, which a graph "
                "cannot: if that is a guard against overflow in torch.float16, load it in torch.float32 or "
                f"torch.bfloat16 ({one_line(error)})"
            ) from error
        raise CaptureError(
            f"{type(model).__name__} cannot be captured without a cache, with one node for attention: "
            f"{one_line(error)} ({raised_at(error)})"
        ) from error


@contextmanager
def _same_attributes(model: PreTrainedModel) -> Iterator[None]:
    """Undo what tracing leaves in the model's own attributes: tensors without values (longrope's factors)."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, kept in before:
            vars(module).clear()
            vars(module).update(kept)


def _require_finite(weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        if value.is_meta:
            raise CaptureError(f"expected weights, found {name} on the meta device; load them first")
        sound = not value.is_floating_point() or bool(torch.isfinite(value.sum()))
        rest(value)
        if not sound:
            count = int((~torch.isfinite(value)).sum())
            if count:
                raise CaptureError(
                    f"expected finite weights, found {count} NaN or infinite values in {name} "
                    f"{list(value.shape)}; the checkpoint is damaged: fetch it again"
                )


def _require_fixed_angles(model: PreTrainedModel) -> None:
    for rope in ropes(model):
        if rope.get("rope_type") in _CHANGING:
            raise CaptureError(
                f"the rotary embedding of {type(model).__name__} is of type {rope['rope_type']!r}: its "
                "frequencies change with the length of the text, which a graph cannot do. Fix one set of "
                "frequencies in the configuration (rope_parameters) for the lengths it is to be used at, and "
                "load the model again"
            )


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """What later stages must know of the model that the graph does not say; JSON values only."""
    config = model.config.get_text_config()
    facts = {key: getattr(config, key, None) for key in _CONFIG_KEYS}
    generation = getattr(model, "generation_config", None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(generation, key, None)
        facts[key] = getattr(config, key, None) if value is None else value
    name = config._name_or_path or type(model).__name__
    facts["name"] = Path(name).name if Path(name).is_absolute() else name  # not whose folder it lay in
    return facts


old_names(globals())
