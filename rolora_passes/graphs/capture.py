"""Capture a transformers causal language model once, without a cache, into canonical form."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from rolora_passes.errors import CaptureError, one_line
from rolora_passes.graphs import ops as _ops  # noqa: F401  (registers the operators)
from rolora_passes.graphs.canonical import canonicalize
from rolora_passes.graphs.graph import run
from rolora_passes.graphs.verify import relative_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "rolora"
_CONFIG_KEYS = ("vocab_size", "hidden_size", "max_position_embeddings", "model_type")
# Tensors transformers hands to every attention function that say nothing about the arithmetic here.
_IGNORED = {"position_ids", "cache_position"}


@dataclasses.dataclass(frozen=True)
class _Mask:
    """What the model asked of its mask; stands where the mask tensor would."""

    local: int | None
    bidirectional: bool


def capture(model: PreTrainedModel, *, check: bool = True) -> fx.GraphModule:
    """Capture a causal language model as `forward(tokens, positions) -> logits` in canonical form.

    Tokens and positions are int64 [B, S], both dimensions dynamic; logits are [B, S, V]. Parameters
    keep their names and are shared with the model, not copied.

    Args:
        model: a transformers model with a language-model head, in eval mode or not (dropout is off).
        check: run graph and model once on 2 x 12 random tokens and compare.

    Raises:
        CaptureError: not a causal LM; weights that are NaN or infinite; attention that is not causal
            (optionally windowed, soft-capped) softmax attention; a graph that does not agree.
    """
    _require_causal_lm(model)
    _require_finite(model)
    training = model.training
    model.eval()
    try:
        with _static_experts(model), _one_node_attention(model):
            exported = _export(model)
        graph = canonicalize(exported.module(check_guards=False))
        graph.meta["config"] = _config(model)
        graph.meta["facts"] = ["canonical"]
        if check:
            _compare(graph, model)
    finally:
        model.train(training)
    return graph


def from_exported(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """Canonical form of an ExportedProgram whose forward takes (tokens, positions) and returns logits."""
    graph = canonicalize(exported.module(check_guards=False))
    graph.meta["config"] = {}
    graph.meta["facts"] = ["canonical"]
    return graph


class _Forward(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return logits


def _export(model: PreTrainedModel) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    tokens = torch.zeros(2, 6, dtype=torch.int64)  # a batch of 1 would be specialised
    positions = torch.arange(6).expand(2, 6)
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto})
    try:
        with torch.no_grad():
            return torch.export.export(
                _Forward(model), (tokens, positions), dynamic_shapes=shapes, strict=False
            )
    except (CaptureError, MemoryError):
        raise
    except Exception as error:  # whatever the model's own code does with what it is given
        raise CaptureError(
            f"{type(model).__name__} cannot be captured without a cache, with one node for attention: "
            f"{one_line(error)}"
        ) from error


def _require_causal_lm(model: object) -> None:
    from transformers import PreTrainedModel

    kind = type(model).__name__
    advice = "load it with transformers.AutoModelForCausalLM"
    if not isinstance(model, PreTrainedModel):
        raise CaptureError(f"expected a transformers causal language model, found {kind}; {advice}")
    head = model.get_output_embeddings()
    lack = (
        (getattr(model.config, "is_encoder_decoder", False) and "also needs an encoder")
        or (head is None and "has no such head")
        or (not model.can_generate() and "does not generate")
    )
    if lack:
        raise CaptureError(
            f"expected a decoder-only model with a language-model head, found {kind}, which {lack}; {advice}"
        )


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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature, [B, H, S, D] in, [B, S, H, D] out, as one node."""
    unknown = sorted(k for k, v in others.items() if not (v is None or isinstance(v, bool) or k in _IGNORED))
    where = type(module).__name__
    if unknown:
        raise CaptureError(f"{where} passes {unknown} to attention; this capture does not know what they do")
    if isinstance(attention_mask, Tensor):
        raise CaptureError(f"{where} builds its own attention mask; expected a causal or windowed one")
    mask = attention_mask or _Mask(None, False)
    causal = getattr(module, "is_causal", True) and others.get("is_causal") is not False
    if mask.bidirectional or not causal:
        raise CaptureError(f"expected causal attention, found bidirectional attention in {where}")
    if mask.local is not None and sliding_window is None:
        raise CaptureError(
            f"{where} attends within a local range of {mask.local} that is not a sliding window "
            "(chunked attention?); only full and sliding-window causal attention are captured"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return torch.ops.rolora.attention(q, k, v, scale, True, sliding_window, softcap), None


def _mask(*args: Any, local_size: int | None = None, **options: Any) -> _Mask:
    return _Mask(local_size, "allow_is_bidirectional_skip" in options)


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
def _one_node_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have the model call `rolora.attention` and build no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    with _setting(model, "_attn_implementation", _NAME):
        yield


def _static_experts(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Have mixtures of experts compute in a way whose shapes do not depend on the routing."""
    return _setting(model, "_experts_implementation", "batched_mm")


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """What later stages must know of the model that the graph does not say; JSON values only."""
    config = model.config.get_text_config()
    facts = {key: getattr(config, key, None) for key in _CONFIG_KEYS}
    generation = model.generation_config
    for key in ("bos_token_id", "eos_token_id"):
        value = getattr(generation, key, None)
        facts[key] = getattr(config, key, None) if value is None else value
    facts["name"] = config._name_or_path or type(model).__name__
    return facts


def _run(graph: fx.GraphModule, tokens: Tensor, model: PreTrainedModel) -> Tensor:
    try:
        return run(graph, tokens)
    except RuntimeError as error:
        raise CaptureError(
            f"the graph of {type(model).__name__} does not run at another sequence length than it was "
            f"captured at (a state space or recurrence?): {one_line(error)}"
        ) from error


def _compare(graph: fx.GraphModule, model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(0, vocabulary, (2, 12), generator=generator)
    with torch.no_grad(), _static_experts(model):
        expected = model(input_ids=tokens, use_cache=False).logits
    if not bool(torch.isfinite(expected).all()):
        raise CaptureError(
            f"{type(model).__name__} itself returns NaN or infinite logits on random tokens in "
            f"{expected.dtype}: its weights are damaged, or too large for that type; "
            "fetch it again, or load it in torch.float32"
        )
    error = relative_error(_run(graph, tokens, model), expected)
    # Above fp32's rounding the model's own float32 islands bound the agreement; below, its own type does.
    allowed = max(1e-4, 50 * torch.finfo(expected.dtype).eps)
    if not error <= allowed:
        raise CaptureError(
            f"expected the graph's logits to equal the model's, found a relative difference of {error:.1e} "
            f"(allowed {allowed:.0e}) in {type(model).__name__}: it computes something capture does not see"
        )
