"""What the metadata of a GGUF file says of a model, as a transformers configuration that says the same.

transformers reads some entries and drops others without a word. Here each one is read, is known to have no
effect, or is named. Where a file is silent, what llama.cpp takes for granted holds, not a default of
transformers, which is one checkpoint's.
"""

from __future__ import annotations

from typing import Any

from rolora_passes.errors import CaptureError
from rolora_passes.loading.checkpoint import some
from rolora_passes.loading.gguf_rope import ROPE, rope_parameters

# Architectures whose files were seen to give the logits of the model that they were made of.
KNOWN = (
    *("gemma2", "gemma3", "gpt2", "lfm2", "llama", "nemotron", "phi3"),
    *("qwen2", "qwen2moe", "qwen3", "qwen3moe", "stablelm", "starcoder2"),
)

_EPSILON = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
# An entry, and the attributes of its meaning: a configuration has one of them, or cannot say it.
_MEANS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "use_parallel_residual": ("use_parallel_residual",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": _EPSILON,
    "attention.layer_norm_epsilon": _EPSILON,
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "shortconv.l_cache": ("conv_L_cache",),
}
# Values at which an entry that the configuration cannot say has no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count", "pooling_type"), (0,)),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale"), (0, 1)),
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "nextn_predict_layers"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "leading_dense_block_count"), (0,)),
    "attention.causal": (True,),
    "expert_gating_func": (0, 1),
    "expert_weights_norm": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
_NEEDED = ("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count")


def configuration(entries: dict[str, Any], tensors: dict[str, Any], found: dict[str, Any]) -> Any:
    """A configuration that says what the entries of a file say.

    Args:
        entries: of the whole file, by their names; arrays as lists.
        tensors: numpy arrays of those that belong to the rotary embedding, by their names.
        found: what transformers reads in them.

    Raises:
        CaptureError: an entry that the configuration has no word for, or one that is missing.
    """
    from transformers import AutoConfig

    prefix = f"{entries['general.architecture']}."
    own = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
    kind = found["model_type"]
    probe = AutoConfig.for_model(kind, **{k: v for k, v in found.items() if k != "model_type"})
    said, unread = {}, []
    for name, value in own.items():
        if name in ROPE or name in _TOGETHER:
            continue
        one = _one(name, value, probe)
        attribute = next((a for a in _MEANS.get(name, ()) if hasattr(probe, a)), None)
        if attribute is not None and one is not None:
            said[attribute] = one
        elif value not in _NEUTRAL.get(name, ()):
            unread.append(f"{prefix}{name} = {value!r:.40}")
    needed = [*_NEEDED, *(["expert_used_count"] if hasattr(probe, "num_experts_per_tok") else [])]
    if missing := [prefix + n for n in needed if n not in own] + _missing_epsilon(prefix, own, probe):
        raise CaptureError(
            f"expected the entry {some(missing)} in a GGUF file of this architecture, found none"
        )
    said |= _heads(own, probe, unread, prefix) | _windows(own, probe, unread, prefix)
    said |= {key: entries.get(f"tokenizer.ggml.{entry}") for key, entry in _TOKENS.items()}
    said |= rope_parameters(own, tensors, probe, said, unread, prefix)
    if unread:
        raise CaptureError(
            f"a {kind} of transformers has no word for the GGUF file's {some(unread)}: it would "
            "compute something "
            "else. Give the checkpoint that the file was made of"
        )
    return AutoConfig.for_model(kind, **{k: v for k, v in (found | said).items() if k != "model_type"})


_TOGETHER = (
    *("attention.key_length", "attention.value_length", "attention.scale", "attention.sliding_window"),
    "attention.sliding_window_pattern",
)


def _one(name: str, value: Any, probe: Any) -> Any:
    """An entry's value; of one that is given layer by layer the only one, or None where layers differ."""
    if not isinstance(value, list):
        return value
    nonzero = {v for v in value if v}
    absent = [not v for v in value]
    kinds = [kind != "full_attention" for kind in getattr(probe, "layer_types", None) or ()]
    if len(nonzero) != 1 or (any(absent) and not (name.startswith("attention.") and absent == kinds)):
        return None
    return nonzero.pop()


def _missing_epsilon(prefix: str, own: dict[str, Any], probe: Any) -> list[str]:
    names = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
    return [] if any(n in own for n in names) else [prefix + names[0]]


def _heads(own: dict[str, Any], probe: Any, unread: list[str], prefix: str) -> dict[str, Any]:
    """Sizes of heads: without an entry there are as many keys as queries, and heads share the embedding."""
    heads, width = own["attention.head_count"], own["embedding_length"]
    if not isinstance(heads, int) or heads < 1:
        raise CaptureError(f"expected one number of attention heads in a GGUF file, found {heads!r:.60}")
    said: dict[str, Any] = {}
    if "attention.head_count_kv" not in own and hasattr(probe, "num_key_value_heads"):
        said["num_key_value_heads"] = heads
    key = own.get("attention.key_length", width // heads)
    if hasattr(probe, "head_dim"):
        said["head_dim"] = key
    elif key != width // heads:
        unread.append(f"{prefix}attention.key_length = {key}")
    return said


def _windows(own: dict[str, Any], probe: Any, unread: list[str], prefix: str) -> dict[str, Any]:
    """Which layers attend within a window, and what else attention says of its own."""
    key = own.get("attention.key_length", own["embedding_length"] // own["attention.head_count"])
    for name, expected in (("attention.value_length", key), ("attention.scale", key**-0.5)):
        if name in own and abs(own[name] - expected) > 1e-6:
            unread.append(f"{prefix}{name} = {own[name]}")
    scalar = getattr(probe, "query_pre_attn_scalar", key)
    if scalar != key:
        unread.append(f"{prefix}attention.key_length = {key} (attention is scaled by {scalar} ** -0.5)")
    window, pattern = own.get("attention.sliding_window"), own.get("attention.sliding_window_pattern")
    alternate = "sliding_attention" in (getattr(probe, "layer_types", None) or ())
    if pattern is not None:
        if not alternate:
            unread.append(f"{prefix}attention.sliding_window_pattern = {pattern!r:.40}")
            return {}
        count = own["block_count"]
        sliding = pattern if isinstance(pattern, list) else [(i + 1) % pattern > 0 for i in range(count)]
        types = {"layer_types": ["sliding_attention" if s else "full_attention" for s in sliding]}
    else:
        types = {}
    if window is None and alternate:
        unread.append(f"lack of {prefix}attention.sliding_window")
    elif (window and not hasattr(probe, "sliding_window")) or hasattr(probe, "use_sliding_window"):
        if window and window < own["context_length"]:
            unread.append(f"{prefix}attention.sliding_window = {window}")
        return {}
    return types | ({"sliding_window": window or None} if hasattr(probe, "sliding_window") else {})
