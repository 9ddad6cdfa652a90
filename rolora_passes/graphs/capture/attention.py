"""Having a model of transformers call one operator for attention, and experts whose shapes are fixed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rolora_passes.errors import CaptureError
from rolora_passes.graphs.capture.kinds import Kind
from rolora_passes.graphs.capture.masks import Mask, Masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "rolora"
# What attention functions are given that says nothing about their arithmetic, or that is heeded below.
_IGNORED = {
    "position_ids", "cache_position", "is_causal", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "deterministic",
}  # fmt: skip


def _attention(
    kind: Kind,
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
def one_node_attention(model: PreTrainedModel, kind: Kind, masks: Masks) -> Iterator[None]:
    """Have the model call `rolora.attention` and build no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, partial(_attention, kind))
    AttentionMaskInterface.register(_NAME, masks)
    with _setting(model, "_attn_implementation", _NAME):
        yield


def static_experts(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Have mixtures of experts compute in a way whose shapes do not depend on the routing."""
    return _setting(model, "_experts_implementation", "batched_mm")
