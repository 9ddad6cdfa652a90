"""The rotary embedding that a GGUF file describes, by its entries and by tensors of factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from rolora_passes.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FACTORS, LONG, SHORT)
ROPE = (
    *(
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.dimension_count",
        "rope.scale_linear",
        "rope.scaling.type",
    ),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.finetuned", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier"),
)
_NEUTRAL = {
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.attn_factor": 1,
}


def rope_parameters(
    own: dict[str, Any],
    tensors: dict[str, Any],
    probe: Any,
    said: dict[str, Any],
    unread: list[str],
    prefix: str,
) -> dict[str, Any]:
    """`rope_parameters` of a configuration; what cannot be said is added to `unread`.

    Linear and YaRN scaling (Peng et al., 2023, arXiv:2309.00071) are llama.cpp's: YaRN's attention factor is
    `1 + 0.1 ln(factor)`, as in transformers. Llama 3.1's is a tensor of factors: see `scale_frequencies`.
    """
    for name, values in tensors.items():
        if not ((values > 0) & (values < math.inf)).all():
            raise CaptureError(
                f"expected finite, positive factors in {name}, found others: fetch the file again"
            )
    if getattr(probe, "rope_parameters", None) is None:
        unread += [f"{prefix}{n} = {own[n]!r:.40}" for n in ROPE if n in own] + sorted(tensors)
        return {}
    width = said.get("head_dim", own["embedding_length"] // own["attention.head_count"])
    before = probe.rope_parameters
    nested = any(isinstance(value, dict) for value in before.values())
    known: dict[str, Any] = {"rope_theta": float(own.get("rope.freq_base", 10000.0))}
    known |= _scaling(own, tensors, unread, prefix)
    if (count := own.get("rope.dimension_count", width)) != width:
        known["partial_rotary_factor"] = count / width
    elif "partial_rotary_factor" in before or hasattr(probe, "partial_rotary_factor"):
        known["partial_rotary_factor"] = 1.0
    if not nested:
        if "rope.freq_base_swa" in own:
            unread.append(f"{prefix}rope.freq_base_swa = {own['rope.freq_base_swa']}")
        return {"rope_parameters": known}
    local: dict[str, Any] = dict(before["sliding_attention"])
    local["rope_theta"] = float(own.get("rope.freq_base_swa", local["rope_theta"]))
    if FACTORS in tensors:
        unread.append(FACTORS)
    return {"rope_parameters": {"full_attention": known, "sliding_attention": local}}


def _scaling(own: dict[str, Any], tensors: dict[str, Any], unread: list[str], prefix: str) -> dict[str, Any]:
    """How frequencies are scaled; a factor without a type is linear, as llama.cpp has it."""
    given: Any = own.get("rope.scaling.factor") or own.get("rope.scale_linear") or 1
    factor = float(given)
    kind = own.get("rope.scaling.type", "linear")
    original = own.get("rope.scaling.original_context_length", own["context_length"])
    if (LONG in tensors) != (SHORT in tensors):
        unread.append(f"{LONG if LONG in tensors else SHORT} without the other")
    if LONG in tensors and SHORT in tensors and kind in ("linear", "longrope") and factor == 1:
        default = math.sqrt(1 + math.log(max(own["context_length"] / original, 1)) / math.log(original))
        return {
            "rope_type": "longrope",
            "long_factor": tensors[LONG].tolist(),
            "short_factor": tensors[SHORT].tolist(),
            "original_max_position_embeddings": original,
            "attention_factor": float(own.get("rope.scaling.attn_factor", default)),
        }
    strange = [n for n, neutral in _NEUTRAL.items() if n in own and own[n] != neutral]
    unread += [f"{prefix}{n} = {own[n]}" for n in strange] + [n for n in (LONG, SHORT) if n in tensors]
    if own.get("rope.scaling.yarn_log_multiplier"):
        unread.append(f"{prefix}rope.scaling.yarn_log_multiplier = {own['rope.scaling.yarn_log_multiplier']}")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": 1 + 0.1 * math.log(factor),
            "beta_fast": float(own.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(own.get("rope.scaling.yarn_beta_slow", 1.0)),
        }
    unread.append(f"{prefix}rope.scaling.type = {kind}")
    return {}


def require_rotary_width(model: PreTrainedModel, own: dict[str, Any], prefix: str) -> None:
    """Refuse a model whose code rotates another number of channels than the file says."""
    expected = own.get("rope.dimension_count")
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and expected is not None and 2 * buffer.numel() != expected:
            raise CaptureError(
                f"a {model.config.model_type} of transformers rotates {2 * buffer.numel()} channels "
                "of a head, and "
                f"the GGUF file's {prefix}rope.dimension_count is {expected}: give the checkpoint "
                "that it was made of"
            )


def scale_frequencies(model: PreTrainedModel, factors: torch.Tensor) -> None:
    """Divide rotary frequencies by factors [head_dim / 2], as Llama 3.1's scaling is written in GGUF."""
    held = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    if not held or any(m.inv_freq.shape != factors.shape for m in held):
        shapes = [list(m.inv_freq.shape) for m in held]
        raise CaptureError(f"expected {FACTORS} as the frequencies {shapes}, found {list(factors.shape)}")
    for module in held:
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(value := getattr(module, name, None), torch.Tensor):
                setattr(module, name, value / factors.to(value))
