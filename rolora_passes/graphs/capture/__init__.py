"""Capture a transformers model once, without a cache, into canonical form.

What a graph takes (`graphs.inputs`) depends on the kind of model. A decoder with its language-model head
gets its positions; an encoder, and an encoder with a decoder, count their own. The result is the logits
where the model has a head, else the last hidden state. Rows are unpadded: there is no padding mask.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from rolora_passes.errors import CaptureError, one_line
from rolora_passes.extras import require
from rolora_passes.graphs import operators as _operators  # noqa: F401  (registers the operators)
from rolora_passes.graphs.capture.canonical import canonicalize
from rolora_passes.graphs.capture.masks import Mask, Masks
from rolora_passes.graphs.capture.precision import InFloat32
from rolora_passes.graphs.evaluate import values_in
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.identity import remember_weights
from rolora_passes.graphs.info import set_info
from rolora_passes.graphs.inputs import DECODER, ENCODER, ENCODER_DECODER, inputs_for
from rolora_passes.graphs.sources import raised_at
from rolora_passes.graphs.verify import relative_error, sample_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "rolora"
_CONFIG_KEYS = ("vocab_size", "hidden_size", "max_position_embeddings", "model_type")
_KEYWORDS = {"tokens": "input_ids", "positions": "position_ids", "decoder_tokens": "decoder_input_ids"}
# What attention functions are given that says nothing about their arithmetic, or that is heeded below.
_IGNORED = {
    "position_ids", "cache_position", "is_causal", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "deterministic",
}  # fmt: skip
# Rotary embeddings whose frequencies depend on the length of the text.
_CHANGING = ("dynamic",)
# Lengths that a configuration may name and from which on something changes.
_SIZES = ("sliding_window", "attention_chunk_size", "local_attention", "original_max_position_embeddings")
_CHUNKS = ("chunk_size", "mamba_chunk_size")  # of scans
_LONGEST_CHECK = 160  # tokens: longer windows than this allows are compared by what the masks say alone


@dataclasses.dataclass(frozen=True)
class _Kind:
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


# Attention functions are registered for the whole process, and torch.export is not made for threads.
_one_at_a_time = threading.Lock()
_DECODER = _Kind(DECODER, True, {"use_cache": False})
_ENCODER = _Kind(ENCODER, False, {})
_ENCODER_DECODER = _Kind(ENCODER_DECODER, None, {"use_cache": False})


def capture(model: PreTrainedModel, *, check: bool = True) -> fx.GraphModule:
    """Capture a language model as `forward(tokens, positions) -> logits` in canonical form.

    Tokens and positions are int64 [B, S], both dimensions dynamic; logits are [B, S, V]. An encoder becomes
    `forward(tokens) -> what its head gives`, or its last hidden state [B, S, d] if it has none; an encoder
    with a decoder `forward(tokens, decoder_tokens [B, T]) -> logits [B, T, V]`. Parameters keep their names
    and are shared with the model, not copied.

    Args:
        model: a transformers model of text, in eval mode or not (dropout is off).
        check: run graph and model once on two rows of random tokens and compare, in float32 if the model is
            narrower. 12 tokens a row, or as many as show every window of up to 78.

    Raises:
        CaptureError: not a model of text, or a decoder without its head; weights that are NaN or infinite;
            attention that is not (optionally windowed, soft-capped) softmax attention, causal in a decoder;
            a graph that does not agree.
    """
    kind = _kind(model)
    _require_finite(model)
    _require_fixed_angles(model)
    with _one_at_a_time, _evaluating(model):
        exported = _export(model, kind)
        graph = canonicalize(exported.module(check_guards=False))
        set_info(graph, config=_config(model))
        remember_weights(graph, exported.state_dict)
        if check:
            _compare(graph, model, kind)
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
        _compare_exported(graph, exported)
    return graph


def _compare_exported(graph: fx.GraphModule, exported: torch.export.ExportedProgram) -> None:
    """Compare a graph with its program on random tokens of the example's shape."""
    args, kwargs = exported.example_inputs
    generator = torch.Generator().manual_seed(0)
    size = sample_tokens(graph, 1, 64).max() + 1

    def drawn(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dtype == torch.int64 and not bool(value.any())
        return torch.randint(0, int(size), value.shape, generator=generator) if whole else value

    args, kwargs = fx.node.map_aggregate((args, kwargs), drawn)
    with torch.no_grad():
        expected = exported.module(check_guards=False)(*args, **kwargs)
        found = graph(*args, **kwargs)
    expected = expected[0] if isinstance(expected, (tuple, list)) else expected
    error, allowed = relative_error(found, expected), max(1e-4, 50 * torch.finfo(expected.dtype).eps)
    if not error <= allowed:
        raise CaptureError(
            f"expected the graph to compute what the exported program does, found a relative difference of "
            f"{error:.1e} (allowed {allowed:.0e})"
        )


class _Forward(nn.Module):
    def __init__(self, model: PreTrainedModel, kind: _Kind) -> None:
        super().__init__()
        self.model = model
        self.kind = kind

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, decoder_tokens: Tensor | None = None
    ) -> Tensor:
        given = {"tokens": tokens, "positions": positions, "decoder_tokens": decoder_tokens}
        return self.kind.call(self.model, {k: v for k, v in given.items() if v is not None})


def _export(model: PreTrainedModel, kind: _Kind) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    tokens = torch.zeros(2, 6, dtype=torch.int64)  # a batch of 1 would be specialised
    samples = {
        "tokens": tokens,
        "positions": torch.arange(6).expand(2, 6),
        "decoder_tokens": tokens[:, :5].clone(),  # a tensor given twice would be one input
    }
    given = {name: samples[name] for name in kind.inputs}
    shapes = {name: {0: auto, 1: auto} for name in given}
    masks = Masks()
    try:
        own_attention = _one_node_attention(model, kind, masks)
        with torch.no_grad(), _same_attributes(model), _static_experts(model), own_attention:
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


def _kind(model: object) -> _Kind:
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


def _require_finite(model: PreTrainedModel) -> None:
    for name, value in model.named_parameters():
        if value.is_meta:
            raise CaptureError(f"expected weights, found {name} on the meta device; load them first")
        if value.is_floating_point() and not torch.isfinite(value.sum()):
            count = int((~torch.isfinite(value)).sum())
            if count:
                raise CaptureError(
                    f"expected finite weights, found {count} NaN or infinite values in {name} "
                    f"{list(value.shape)}; the checkpoint is damaged: fetch it again"
                )


def _attention(
    kind: _Kind,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature, [B, H, S, D] in, [B, S, H, D] out, as one node.

    The mask decides what is seen: a window that a model passes here and not to its mask is not applied by
    transformers' own eager attention either.
    """
    where = type(module).__name__
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _IGNORED)
    if unknown:
        raise CaptureError(f"{where} passes {unknown} to attention; this capture does not know what they do")
    if isinstance(attention_mask, Tensor):
        raise CaptureError(f"{where} builds its own attention mask; expected a causal or windowed one")
    mask = attention_mask or Mask(causal=True, window=None)
    if mask.other is not None:
        raise CaptureError(f"{where} has {mask.other}; only full and sliding-window attention are captured")
    said = others.get("is_causal")
    causal = (getattr(module, "is_causal", True) if said is None else said) and mask.causal
    if kind.causal is True and not causal:
        raise CaptureError(f"expected causal attention, found bidirectional attention in {where}")
    if kind.causal is False and causal:
        raise CaptureError(
            f"expected an encoder's bidirectional attention, found causal attention in {where}; a decoder is "
            "captured with its language-model head: load it with transformers.AutoModelForCausalLM"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return torch.ops.rolora.attention(q, k, v, scale, causal, mask.window, softcap), None


def _ropes(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What the configuration says of rotary embeddings: one for all layers, or one for each kind of layer."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return [rope for rope in (found, *found.values()) if isinstance(rope, dict)]


def _require_fixed_angles(model: PreTrainedModel) -> None:
    for rope in _ropes(model):
        if rope.get("rope_type") in _CHANGING:
            raise CaptureError(
                f"the rotary embedding of {type(model).__name__} is of type {rope['rope_type']!r}: its "
                "frequencies change with the length of the text, which a graph cannot do. Fix one set of "
                "frequencies in the configuration (rope_parameters) for the lengths it is to be used at, and "
                "load the model again"
            )


@contextmanager
def _setting(model: PreTrainedModel, name: str, value: str) -> Iterator[None]:
    """Set an attribute of every configuration inside the model; restore it afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: getattr(config, name, None) for key, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, name, value)
        yield
    finally:
        for key, config in configs.items():
            setattr(config, name, before[key])


@contextmanager
def _one_node_attention(model: PreTrainedModel, kind: _Kind, masks: Masks) -> Iterator[None]:
    """Have the model call `rolora.attention` and build no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, partial(_attention, kind))
    AttentionMaskInterface.register(_NAME, masks)
    with _setting(model, "_attn_implementation", _NAME):
        yield


def _static_experts(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Have mixtures of experts compute in a way whose shapes do not depend on the routing."""
    return _setting(model, "_experts_implementation", "batched_mm")


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


def _run(graph: fx.GraphModule, inputs: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
    try:
        with torch.no_grad():
            result: Tensor = graph(*inputs.values())
        return result
    except RuntimeError as error:
        raise CaptureError(
            f"the graph of {type(model).__name__} does not run at another sequence length than it was "
            f"captured at (a state space or recurrence?): {one_line(error)}"
        ) from error


def _compare(graph: fx.GraphModule, model: PreTrainedModel, kind: _Kind) -> None:
    """Compare graph and model on random tokens; in float32 where the model is narrower, as rounding hides
    what is wrong."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(0, vocabulary, (2, _length(graph, model)), generator=generator)
    inputs = inputs_for(graph, tokens)
    own = {name: value for name, value in inputs.items() if name != "positions"}  # the model counts them too
    with torch.no_grad(), _static_experts(model):
        expected = kind.call(model, own)
        found = _run(graph, inputs, model)
        for what, logits in (("itself", expected), ("as a graph", found)):
            if not bool(torch.isfinite(logits).all()):
                raise CaptureError(
                    f"{type(model).__name__} {what} returns NaN or infinite logits on random tokens in "
                    f"{logits.dtype}: its weights are damaged, or too large for that type; "
                    "fetch it again, or load it in torch.float32"
                )
        if expected.dtype.itemsize < torch.float32.itemsize:
            with InFloat32():
                expected = kind.call(model, own)
            for _, value in values_in(graph, tokens, torch.float32):
                found = value
    error, allowed = relative_error(found, expected), 1e-4  # the model's own float32 islands bound it
    if not error <= allowed:
        raise CaptureError(
            f"expected the graph's logits to equal the model's, found a relative difference of {error:.1e} "
            f"(allowed {allowed:.0e}) in {type(model).__name__}: it computes something capture does not see"
        )


def _length(graph: fx.GraphModule, model: PreTrainedModel) -> int:
    """How many tokens to compare: more than every window or chunk that is short enough to be seen cheaply."""
    config = model.config.get_text_config()
    sizes = [node.args[5] for node in graph.graph.nodes if is_op(node, "attention") and len(node.args) > 5]
    sizes += [getattr(config, key, None) for key in _SIZES]
    sizes += [rope.get(key) for rope in _ropes(model) for key in _SIZES]
    sizes = [2 * size + 4 for size in sizes if isinstance(size, int) and 2 * size + 4 <= _LONGEST_CHECK]
    chunks = [getattr(config, key, None) for key in _CHUNKS]
    sizes += [size + 1 for size in chunks if isinstance(size, int) and size < 2 * _LONGEST_CHECK]
    longest = getattr(config, "max_position_embeddings", None) or 2 * _LONGEST_CHECK
    return int(min(max(12, *sizes, 12), longest))
