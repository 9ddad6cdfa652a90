"""Variants of tiny checkpoints and GGUF files, each with the model that it means, if it can be read."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_files as files
import numpy as np
import torch
import transformers as t
from architectures import CONFIGS, tiny
from safetensors.torch import load_file, save_file
from tiny_checkpoint import character_tokenizer

Model = Callable[[], t.PreTrainedModel]


@dataclass
class Variant:
    """Files at a path.

    Attributes:
        expected: the model that the files mean; None if they cannot be read whole.
        same: whether they mean what they meant before the change: a refusal is then wrong.
        named: a refusal has one of these words.
    """

    path: Path
    kind: str
    what: str
    expected: Model | None
    same: bool = False
    named: tuple[str, ...] = ()


ARCHITECTURES = (
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "mixtral",
    "olmo2",
)
# Keys that matter, and other values of theirs; None takes the key out.
KEYS: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (True, False, None),
    "attention_bias": (True, False, None),
    "mlp_bias": (True, False, None),
    "num_hidden_layers": (1, 3, None),
    "num_attention_heads": (2, 3, 8, None),
    "num_key_value_heads": (1, 4, None),
    "head_dim": (4, 16, None),
    "hidden_size": (16, 32),
    "intermediate_size": (20, 64),
    "vocab_size": (96, 128),
    "sliding_window": (2, 64, None),
    "rms_norm_eps": (1e-2, None),
    "hidden_act": ("gelu", "relu", "nonsense", None),
    "rope_parameters": (
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "unheard", "rope_theta": 10000.0},
        None,
    ),
    "model_type": ("llama", "qwen2", "nonsense", None),
    "query_pre_attn_scalar": (4, 256, None),
    "final_logit_softcapping": (1.0, None),
}


def checkpoints(folder: Path) -> Callable[[random.Random], Variant]:
    """Makes variants of checkpoints in safetensors."""
    bases: dict[str, tuple[Path, dict[str, torch.Tensor], dict[str, Any]]] = {}
    for name in ARCHITECTURES:
        model = tiny(name, torch.float32)
        model.save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
        tensors = load_file(folder / name / "model.safetensors")
        bases[name] = folder / name, tensors, json.loads((folder / name / "config.json").read_text())
    assert set(ARCHITECTURES) <= set(CONFIGS)

    def make(generator: random.Random) -> Variant:
        name = generator.choice(ARCHITECTURES)
        base, tensors, config = bases[name]
        path = folder / "variant"
        shutil.copytree(base, path)
        change = generator.choice(
            (_config, _config, _remove, _add, _rename, _reshape, _retype, _replace, _nothing)
        )
        what, same, read, named, tensors, config = change(generator, name, dict(tensors), dict(config))
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
        expected = (lambda: _meant(config, tensors, base)) if read else None
        return Variant(path, "checkpoint", f"{name}: {what}", expected, same, named)

    return make


Change = tuple[str, bool, bool, tuple[str, ...], dict[str, torch.Tensor], dict[str, Any]]


def _meant(config: dict[str, Any], tensors: dict[str, torch.Tensor], base: Path) -> t.PreTrainedModel:
    """The class that config.json names, with the tensors of the files put in by their names."""
    made = t.AutoConfig.for_model(**config) if "model_type" in config else t.AutoConfig.from_pretrained(base)
    model = t.AutoModelForCausalLM.from_config(made).eval()
    if "mixtral" in made.model_type:  # whose experts are saved one by one
        return t.AutoModelForCausalLM.from_pretrained(base.parent / "variant")
    held = dict(model.named_parameters())
    for name, value in tensors.items():
        if name in held or name == "lm_head.weight":
            if name == "lm_head.weight" and name not in held:  # tied, and the file has one of its own
                model.lm_head.weight = torch.nn.Parameter(value.float())
            else:
                with torch.no_grad():
                    held[name].copy_(value)
        else:
            assert "inv_freq" in name, name
    assert not [n for n in held if n not in tensors and n != "lm_head.weight"]
    return model


def _nothing(_: random.Random, name: str, tensors: dict[str, Any], config: dict[str, Any]) -> Change:
    return "as it is", True, True, (), tensors, config


def _config(g: random.Random, name: str, tensors: dict[str, Any], config: dict[str, Any]) -> Change:
    key = g.choice([k for k in KEYS if k in config])
    value = g.choice(KEYS[key])
    same = config.get(key) == value
    config = {k: v for k, v in config.items() if k != key} | ({} if value is None else {key: value})
    return f"{key} = {value}", same, True, (), tensors, config


def _remove(g: random.Random, name: str, tensors: dict[str, Any], config: dict[str, Any]) -> Change:
    key = g.choice(sorted(tensors))
    del tensors[key]
    named = () if name == "mixtral" and "expert" in key else (key.rpartition(".")[0],)
    return f"without {key}", False, False, named, tensors, config


def _add(g: random.Random, name: str, tensors: dict[str, Any], config: dict[str, Any]) -> Change:
    prefix = "model.layers.0" if "model.norm.weight" in tensors else "transformer.h.0"
    extra = g.choice(
        (
            f"{prefix}.self_attn.{g.choice('qkvo')}_proj.lora_A.weight",
            f"{prefix}.mlp.extra.weight",
            f"{prefix}.self_attn.sinks",
            "model.layers.7.self_attn.q_proj.weight",
            "v_head.summary.weight",
            "visual.patch_embed.weight",
            "mtp.layers.0.weight",
            "model.norm.bias",
            f"{prefix}.self_attn.rotary_emb.inv_freq",
        )
    )
    tensors[extra] = torch.randn(12) * 3
    if extra.endswith("inv_freq") and "head_dim" in config and name != "gpt2" and g.random() < 0.5:
        base = config.get("rope_parameters", {}).get("rope_theta", 10000.0)
        tensors[extra] = 1 / base ** (torch.arange(0, 8, 2) / 8)
        return f"with the frequencies, {extra}", name in ("llama", "qwen3"), True, (), tensors, config
    return f"with {extra}", False, False, (extra,), tensors, config


def _rename(g: random.Random, name: str, tensors: dict[str, Any], config: dict[str, Any]) -> Change:
    key = g.choice(sorted(tensors))
    new = key.replace("weight", "weights") if "weight" in key else key + "_old"
    tensors[new] = tensors.pop(key)
    return f"{key} is {new}", False, False, (), tensors, config


def _reshape(g: random.Random, name: str, tensors: dict[str, Any], config: dict[str, Any]) -> Change:
    key = g.choice(sorted(tensors))
    value = tensors[key]
    made = (value[:-1], torch.cat((value, value)), value.flatten()[:, None], value[None])
    tensors[key] = g.choice(made).contiguous().clone()
    return f"{key} as {list(tensors[key].shape)}", False, False, (), tensors, config


def _retype(g: random.Random, name: str, tensors: dict[str, Any], config: dict[str, Any]) -> Change:
    key = g.choice(sorted(tensors))
    kind = g.choice(
        (torch.int8, torch.uint8, torch.int32, torch.bool, torch.float16, torch.bfloat16, torch.float64)
    )
    tensors[key] = tensors[key].to(kind)
    return f"{key} as {kind}", kind.is_floating_point, kind.is_floating_point, (), tensors, config


def _replace(g: random.Random, name: str, tensors: dict[str, Any], config: dict[str, Any]) -> Change:
    """Save a head of its own, or the embedding twice, where they are tied; or put other values."""
    if config.get("tie_word_embeddings", True) and "model.embed_tokens.weight" in tensors:
        own = g.random() < 0.5
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table.flip(0).contiguous() if own else table.clone()
        return f"{'another' if own else 'the same'} head, tied", not own, True, (), tensors, config
    key = g.choice(sorted(tensors))
    tensors[key] = tensors[key] * 1.5
    return f"other values in {key}", True, True, (), tensors, config


# --- GGUF ---

GGUF_KEYS: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("linear", "yarn", "longrope", "none", "unheard"),
    "attention.scale": (0.5,),
    "attention.causal": (True, False),
    "attention.clamp_kqv": (3.0, 0.0),
    "attention.sliding_window": (4, 128),
    "attention.value_length": (4,),
    "attention.key_length": (4,),
    "rope.dimension_count": (4,),
    "rope.freq_base": (500.0,),
    "attn_logit_softcapping": (5.0,),
    "final_logit_softcapping": (2.0,),
    "logit_scale": (0.5, 1.0),
    "residual_scale": (0.5,),
    "embedding_scale": (12.0,),
    "expert_count": (0, 8),
    "expert_used_count": (1,),
    "unheard_of": (1,),
    "block_count": (1, 3),
    "attention.head_count": (2, 8, 3),
    "attention.head_count_kv": (1, 4),
    "feed_forward_length": (16,),
    "embedding_length": (16,),
}


def gguf_files(folder: Path) -> Callable[[random.Random], Variant]:
    """Makes variants of GGUF files."""
    folder.mkdir(parents=True)
    bases = {}
    for name in files.MODELS:
        model = files.tiny(name)
        bases[name] = model, files.entries_of(name, model), files.tensors_of(name, model)

    def make(generator: random.Random) -> Variant:
        name = generator.choice(sorted(bases))
        model, entries, tensors = bases[name]
        change = generator.choice((_entry, _entry, _scaled, _without, _tensor, _tokens, _plain))
        what, same, expected, named, entries, tensors, others = change(
            generator, name, model, dict(entries), dict(tensors)
        )
        path = files.write_gguf(folder / "variant.gguf", name, entries, tensors, others)
        return Variant(path, "GGUF", f"{name}: {what}", expected, same, named)

    return make


GgufChange = tuple[
    str, bool, Model | None, tuple[str, ...], dict[str, Any], dict[str, np.ndarray], dict[str, Any]
]
Given = tuple[random.Random, str, t.PreTrainedModel, dict[str, Any], dict[str, np.ndarray]]


def _plain(*given: Any) -> GgufChange:
    _, _, model, entries, tensors = given
    return "as it is", True, lambda: model, (), entries, tensors, {}


def _with(model: t.PreTrainedModel, **changes: Any) -> Model | None:
    """The same weights in a model of another configuration; None if they do not fit."""
    config = model.config.to_dict()
    try:
        other = t.AutoModelForCausalLM.from_config(type(model.config)(**{**config, **changes})).eval()
        other.load_state_dict(model.state_dict())
    except Exception:  # whatever a configuration refuses
        return None
    return lambda: other


def _entry(*given: Any) -> GgufChange:
    """Another value of an entry: what it means where that can be said by a configuration, else a refusal."""
    generator, name, model, entries, tensors = given
    key = generator.choice(sorted(GGUF_KEYS))
    value = generator.choice(GGUF_KEYS[key])
    before = entries.get(key)
    entries[key] = value
    named = (key, "scaling", "tensors", "expected", "rope_") if before is None else ()
    neutral = (
        ("attention.causal", True),
        ("attention.clamp_kqv", 0.0),
        ("logit_scale", 1.0),
        ("expert_count", 0),
    )
    if (key, value) in neutral and (key != "expert_count" or "moe" not in name):
        return f"{key} = {value}", True, lambda: model, (), entries, tensors, {}
    expected: Model | None = None
    config = model.config
    if value == before or (
        key == "rope.scaling.type"
        and value in ("linear", "none", "yarn")
        and getattr(config, "rope_parameters", None)
    ):
        expected = lambda: model  # noqa: E731
    elif key in ("attn_logit_softcapping", "final_logit_softcapping") and hasattr(config, key):
        expected = _with(model, **{key: value})
    elif key == "rope.freq_base" and getattr(config, "rope_parameters", None):
        rope = config.rope_parameters
        theta = {"rope_theta": value}
        nested = "full_attention" in rope
        rope = (
            {**rope, "full_attention": {**rope["full_attention"], **theta}} if nested else {**rope, **theta}
        )
        expected = _with(model, rope_parameters=rope)
    elif key == "attention.sliding_window" and hasattr(config, key.split(".")[1]) and "qwen" not in name:
        expected = _with(model, sliding_window=value)
    elif key == "attention.sliding_window" and value == 128:
        expected = lambda: model  # noqa: E731  (a window of the whole context)
    elif key == "rope.dimension_count" and "partial_rotary_factor" in (
        getattr(config, "rope_parameters", 0) or ()
    ):
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        expected = _with(
            model, rope_parameters={**config.rope_parameters, "partial_rotary_factor": 4 / width}
        )
    elif key == "feed_forward_length" and "moe" in name:
        expected = lambda: model  # noqa: E731  (no layer is without experts)
    elif key == "expert_used_count" and "moe" in name:
        expected = _with(model, num_experts_per_tok=1)
    elif key == "attention.head_count" and name in ("gpt2",):
        expected = _with(model, n_head=value)
    elif key.startswith("attention.head") and name not in ("llama",):
        expected = _with(
            model,
            **{{"head_count": "num_attention_heads"}.get(key.split(".")[1], "num_key_value_heads"): value},
        )
    return f"{key} = {value}", False, expected, named, entries, tensors, {}


def _scaled(*given: Any) -> GgufChange:
    """Llama 3.1's, YaRN's and linear scaling of the rotary frequencies."""
    generator, _, model, entries, tensors = given
    kind = generator.choice(("llama3", "yarn", "linear", "factors of another size"))
    rope = getattr(model.config, "rope_parameters", None) or {}
    nested = "full_attention" in rope
    inner = rope.get("full_attention", rope)
    if kind == "factors of another size":
        tensors["rope_freqs.weight"] = np.ones(3, np.float32)
        return kind, False, None, ("rope_freqs",), entries, tensors, {}
    known: dict[str, Any] = {"rope_type": kind, "factor": 4.0}
    if kind == "llama3":
        known |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    elif kind == "yarn":
        known |= {"original_max_position_embeddings": 32}
        entries |= {"rope.scaling.original_context_length": 32}
    if kind != "llama3":
        entries |= {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    made = {**inner, **known}
    expected = (
        _with(model, rope_parameters={**rope, "full_attention": made} if nested else made) if rope else None
    )
    if kind == "llama3":
        if not rope or nested or expected is None:
            tensors["rope_freqs.weight"] = np.ones(8, np.float32)
            return "rope_freqs", False, None, ("rope", "frequencies"), entries, tensors, {}
        plain = _frequencies(model)
        tensors["rope_freqs.weight"] = (plain / _frequencies(expected())).numpy()
    return kind, False, expected, ("rope", "frequencies"), entries, tensors, {}


def _frequencies(model: t.PreTrainedModel) -> torch.Tensor:
    return next(b for n, b in model.named_buffers() if n.endswith("rotary_emb.inv_freq"))


def _without(*given: Any) -> GgufChange:
    """An entry left out: one that a file needs is asked for, another is what llama.cpp takes for granted."""
    generator, name, model, entries, tensors = given
    key = generator.choice(sorted(entries))
    value = entries.pop(key)
    config, expected = model.config, None
    heads = config.num_attention_heads
    default = {"attention.head_count_kv": heads, "rope.freq_base": 10000.0, "use_parallel_residual": False}
    width = config.hidden_size // heads
    default |= {
        "attention.key_length": width,
        "attention.value_length": entries.get("attention.key_length", width),
    }
    default |= {"rope.dimension_count": entries.get("attention.key_length", width)}
    if default.get(key) == value or key == "attention.value_length":
        expected = lambda: model  # noqa: E731
    elif key == "rope.freq_base" and "full_attention" not in config.rope_parameters:
        expected = _with(model, rope_parameters={**config.rope_parameters, "rope_theta": 10000.0})
    elif key == "rope.freq_base":
        rope = config.rope_parameters
        full = {**rope["full_attention"], "rope_theta": 10000.0}
        expected = _with(model, rope_parameters={**rope, "full_attention": full})
    elif key == "attention.sliding_window" and name == "phi3":
        expected = _with(model, sliding_window=None)
    elif key.endswith("softcapping"):
        expected = lambda: model  # noqa: E731  (Gemma 2's own are llama.cpp's defaults)
    elif key == "rope.dimension_count":
        expected = _with(model, rope_parameters={**config.rope_parameters, "partial_rotary_factor": 1.0})
    return f"without {key}", False, expected, (), entries, tensors, {}


def _tensor(*given: Any) -> GgufChange:
    """Tensors taken away, added, renamed, of another shape, or biases for projections."""
    generator, name, model, entries, tensors = given
    key = generator.choice(sorted(tensors))
    kind = generator.choice(("without", "more", "renamed", "reshaped", "biases"))
    if kind == "biases":
        if name != "llama":
            return _plain(*given)
        return _biases(generator, model, entries, tensors)
    if kind == "without":
        del tensors[key]
        tied = key == "output.weight"
        expected = _with_tied(model) if tied else None
        expected = _zero(model, key) if key.endswith(".bias") and name == "stablelm" else expected
        return f"without {key}", False, expected, (), entries, tensors, {}
    if kind == "more":
        extra = generator.choice(
            ("blk.0.attn_sinks.weight", "blk.0.extra.weight", "blk.9.attn_q.weight", "cls.weight")
        )
        tensors[extra] = np.ones(8, np.float32)
        return f"with {extra}", False, None, (extra, "in transformers' names"), entries, tensors, {}
    if kind == "renamed":
        tensors["x" + key] = tensors.pop(key)
        return f"{key} renamed", False, None, (), entries, tensors, {}
    tensors[key] = np.ascontiguousarray(np.concatenate((tensors[key], tensors[key])))
    return f"{key} twice as long", False, None, (), entries, tensors, {}


def _with_tied(model: t.PreTrainedModel) -> Model:
    other = type(model)(type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": True})).eval()
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    other.load_state_dict(state, strict=False)
    other.tie_weights()
    return lambda: other


def _zero(model: t.PreTrainedModel, key: str) -> Model | None:
    return None


def _biases(
    generator: random.Random,
    model: t.PreTrainedModel,
    entries: dict[str, Any],
    tensors: dict[str, np.ndarray],
) -> GgufChange:
    which = generator.choice(("qkv", "qkvo"))
    other = type(model)(type(model.config)(**{**model.config.to_dict(), "attention_bias": True})).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer in other.model.layers:
            for letter in "qkvo":
                bias = getattr(layer.self_attn, f"{letter}_proj").bias
                bias.copy_(torch.randn_like(bias) if letter in which else torch.zeros_like(bias))
    made = files.tensors_of("llama", other)
    if "o" not in which:
        made = {k: v for k, v in made.items() if not k.endswith("attn_output.bias")}
    return f"with biases of {which}", True, lambda: other, (), entries, made, {}


def _tokens(*given: Any) -> GgufChange:
    """Entries of the tokenizer and of the file: those of no effect are passed over, unknown ones named."""
    generator, _, model, entries, tensors = given
    key, value, fine = generator.choice(
        (
            ("general.description", "text", True),
            ("general.quantized_by", "someone", True),
            ("quantize.imatrix.file", "file", True),
            ("tokenizer.ggml.eot_token_id", 1, True),
            ("tokenizer.ggml.fim_pre_token_id", 1, True),
            ("tokenizer.ggml.add_bos_token", True, True),
            ("tokenizer.ggml.add_space_prefix", False, True),
            ("tokenizer.chat_template", "{{ messages[0].content }}", True),
            ("split.count", 2, False),
            ("tokenizer.ggml.add_sep_token", True, False),
            ("tokenizer.ggml.add_space_prefix", True, False),
            ("tokenizer.ggml.unheard_of", 1, False),
            ("unheard.of", 1, False),
            ("general.type", "adapter", False),
        )
    )
    named = () if fine else (key.rpartition(".")[2], "adapter")
    return f"{key} = {value}", fine, (lambda: model) if fine else None, named, entries, tensors, {key: value}
