"""Tiny random models of many architectures, with gains and biases that are not trivial."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
import transformers as t

BASE = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UNTIED = {**BASE, "tie_word_embeddings": False}
CONFIGS: dict[str, Callable[[], t.PretrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**UNTIED),
    "llama-tied": lambda: t.LlamaConfig(**BASE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": lambda: t.MistralConfig(**UNTIED, sliding_window=4),
    "qwen2": lambda: t.Qwen2Config(**UNTIED),
    "qwen3": lambda: t.Qwen3Config(**UNTIED),
    "gemma": lambda: t.GemmaConfig(**BASE),
    "gemma2": lambda: t.Gemma2Config(**BASE, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3": lambda: t.Gemma3TextConfig(
        **BASE, sliding_window=4, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "phi3": lambda: t.Phi3Config(**UNTIED),
    "phi": lambda: t.PhiConfig(**UNTIED, partial_rotary_factor=0.5),
    "opt": lambda: t.OPTConfig(
        vocab_size=97, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=24,
    ),
    "gpt2": lambda: t.GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": lambda: t.GPTNeoXConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "mixtral": lambda: t.MixtralConfig(**UNTIED, num_local_experts=4),
    "cohere": lambda: t.CohereConfig(**BASE),
    "granite": lambda: t.GraniteConfig(**UNTIED, residual_multiplier=0.7, embedding_multiplier=1.3),
    "stablelm": lambda: t.StableLmConfig(**{**UNTIED, "hidden_size": 32}, hidden_act="gelu"),
    "olmo2": lambda: t.Olmo2Config(**UNTIED),
    "smollm3": lambda: t.SmolLM3Config(**UNTIED),
    "starcoder2": lambda: t.Starcoder2Config(**UNTIED),
}  # fmt: skip
FULL = os.environ.get("ROLORA_TESTS") == "all"  # make test-all
# Of every kind of norm, projection, position and residual stream one, for what is built of rewrites that are
# tested on more.
SOME = (
    list(CONFIGS) if FULL else ["llama", "llama-tied", "gemma2", "phi3", "opt", "gpt2", "mixtral", "cohere"]
)
SMALL = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 97, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}  # fmt: skip
DEBERTA = {
    **SMALL, "type_vocab_size": 0, "position_biased_input": False, "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm",
}  # fmt: skip
MODERN = {**SMALL, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
ENCODERS: dict[str, Callable[[], t.PreTrainedModel]] = {
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL)),
    "bert-bare": lambda: t.BertModel(t.BertConfig(**SMALL), add_pooling_layer=False),
    "bert-classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**SMALL, num_labels=3)),
    "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**SMALL)),
    "modernbert": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(**MODERN, local_attention=8)),
    "deberta": lambda: t.DebertaV2ForMaskedLM(
        t.DebertaV2Config(**DEBERTA, share_att_key=True, position_buckets=8)
    ),
    "deberta-bare": lambda: t.DebertaV2Model(t.DebertaV2Config(**DEBERTA, conv_kernel_size=3)),
}
SEQ2SEQ: dict[str, Callable[[], t.PreTrainedModel]] = {
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**BART)),
    "mbart": lambda: t.MBartForConditionalGeneration(t.MBartConfig(**BART, scale_embedding=True)),
    "marian": lambda: t.MarianMTModel(t.MarianConfig(**BART)),
}
OTHERS = ENCODERS | SEQ2SEQ
# Others have between them what these are made of: `make test-all` takes them too.
MORE = {"qwen2", "gemma", "granite", "stablelm", "smollm3", "starcoder2", "bert-bare", "roberta", "mbart"}


def chosen(names: Iterable[str]) -> list[str]:
    """The architectures that a test of them all runs on."""
    return [name for name in names if FULL or name not in MORE]


def tiny(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> t.PreTrainedModel:
    """A tiny random model; every gain and bias is random too."""
    torch.manual_seed(seed)
    model = (OTHERS[name]() if name in OTHERS else _causal(CONFIGS[name]())).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(3)
    return model


def _causal(config: t.PretrainedConfig) -> t.PreTrainedModel:
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    return t.AutoModelForCausalLM.from_config(config)


def tiny_wide(dtype: torch.dtype = torch.float32) -> t.PreTrainedModel:
    """A llama whose linears are multiples of 64 wide: what groups of quantized weights need."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    return t.LlamaForCausalLM(t.LlamaConfig(**{**UNTIED, **sizes})).to(dtype).eval()
