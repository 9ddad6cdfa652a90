"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as t
from tokenizers import pre_tokenizers

TOKENS = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
SIZES = {
    "vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
FLAT = {**SIZES, "head_dim": 8}  # for models whose heads share the embedding's width
GEMMA = {**SIZES, "head_dim": 256, "sliding_window": 8, "tie_word_embeddings": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
GPT2 = {"vocab_size": len(TOKENS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128}
MODELS: dict[str, Callable[[], t.PretrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**SIZES),
    "qwen2": lambda: t.Qwen2Config(**FLAT),
    "qwen3": lambda: t.Qwen3Config(**SIZES),
    "gemma2": lambda: t.Gemma2Config(**GEMMA),
    "gemma3": lambda: t.Gemma3TextConfig(
        **{**GEMMA, "num_hidden_layers": 7}, rope_theta=1e6, rope_local_base_freq=10000.0
    ),
    "phi3": lambda: t.Phi3Config(**FLAT, sliding_window=8),
    "starcoder2": lambda: t.Starcoder2Config(**FLAT),
    "stablelm": lambda: t.StableLmConfig(**FLAT, partial_rotary_factor=0.5),
    "nemotron": lambda: t.NemotronConfig(**FLAT, partial_rotary_factor=0.5),
    "gpt2": lambda: t.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True),
    "qwen3moe": lambda: t.Qwen3MoeConfig(**SIZES, **MOE, norm_topk_prob=True),
    "qwen2moe": lambda: t.Qwen2MoeConfig(**FLAT, **MOE, shared_expert_intermediate_size=16),
    "lfm2": lambda: t.Lfm2Config(
        **FLAT, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
}


def tiny(name: str) -> t.PreTrainedModel:
    """A tiny model of an architecture, by GGUF's name of it; every gain and bias is random."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3) if parameter.dim() == 1 else parameter.mul_(4)
    return model


def entries_of(name: str, model: t.PreTrainedModel) -> dict[str, Any]:
    """What the converter writes of a model's configuration, without the architecture before a name."""
    config = model.config
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if name != "gpt2":
        found["attention.head_count_kv"] = config.num_key_value_heads
    for attribute in ("rms_norm_eps", "norm_eps"):
        if hasattr(config, attribute) and name != "nemotron":
            found["attention.layer_norm_rms_epsilon"] = float(getattr(config, attribute))
    for attribute in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"):
        if hasattr(config, attribute) and "attention.layer_norm_rms_epsilon" not in found:
            found["attention.layer_norm_epsilon"] = float(getattr(config, attribute))
    return found | _more(name, config)


def _more(name: str, config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rope = getattr(config, "rope_parameters", None)
    if rope:
        rope = rope.get("full_attention", rope)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found["rope.freq_base"] = float(rope["rope_theta"])
        found["rope.dimension_count"] = int(width * rope.get("partial_rotary_factor", 1))
        if getattr(config, "head_dim", None):
            found |= {"attention.key_length": width, "attention.value_length": width}
    if name in ("gemma2", "gemma3", "phi3"):
        found["attention.sliding_window"] = config.sliding_window
    if name == "gemma2":
        found["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if "moe" in name:
        found |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if name == "qwen2moe":
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if name == "stablelm":
        found["use_parallel_residual"] = config.use_parallel_residual
    if name == "lfm2":
        found["shortconv.l_cache"] = config.conv_L_cache
        kinds = config.layer_types
        found["attention.head_count_kv"] = [config.num_key_value_heads * (k != "conv") for k in kinds]
    return found


def tensors_of(name: str, model: t.PreTrainedModel) -> dict[str, np.ndarray]:
    """A model's tensors as the converter writes them: names, rows of llama's heads, norms, experts."""
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    tied = model.config.tie_word_embeddings
    for key, value in model.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        stem, _, kind = key.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, kind = key, "weight"
        array = value.float().numpy()
        if stem.endswith("experts.gate_up_proj"):
            block = f"blk.{stem.split('.')[2]}"
            found[f"{block}.ffn_gate_exps.weight"], found[f"{block}.ffn_up_exps.weight"] = np.split(
                array, 2, 1
            )
            continue
        known = names.get_name(stem)
        assert known is not None, key
        found[f"{known}.{kind}"] = _converted(name, f"{known}.{kind}", array, model.config)
    return {k: np.ascontiguousarray(v) for k, v in found.items()}


def _converted(name: str, key: str, array: np.ndarray, config: Any) -> np.ndarray:
    heads = {"attn_q": config.num_attention_heads}
    heads["attn_k"] = getattr(config, "num_key_value_heads", None) or heads["attn_q"]
    count = heads.get(key.split(".")[-2])
    if name == "llama" and count:
        return (
            array.reshape(count, 2, len(array) // count // 2, *array.shape[1:])
            .swapaxes(1, 2)
            .reshape(array.shape)
        )
    if name in ("gemma2", "gemma3", "nemotron") and key.endswith("norm.weight"):
        return array + 1
    if name == "gpt2" and array.ndim == 2 and key.startswith("blk"):
        return array.T
    return array[:, 0] if "shortconv.conv" in key else array[0] if "inp_shexp" in key else array


def write_gguf(
    path: Path,
    name: str,
    entries: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    others: Mapping[str, Any] | None = None,
) -> Path:
    """Write a file; entries get the architecture's name before theirs, others are whole names."""
    writer = gguf.GGUFWriter(path, name)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["a b"])
    default = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    everything = {f"{name}.{key}": value for key, value in entries.items()} | default | dict(others or {})
    for key, value in everything.items():
        _add(writer, key, value)
    for key, array in tensors.items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    kinds: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    kinds[type(value)](key, value)
