"""A GGUF file gives the logits of the model that it was made of, or is refused by a name in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as t
from gguf_files import MODELS, TOKENS, entries_of, tensors_of, tiny, write_gguf

from rolora_passes.errors import CaptureError
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.verify import relative_error
from rolora_passes.loading.models import load_model, load_outline

BATCH = torch.randint(2, 250, (1, 40), generator=torch.Generator().manual_seed(1))


def error(found: torch.nn.Module, expected: torch.nn.Module) -> float:
    """The largest difference of logits, over the largest logit."""
    with torch.no_grad():
        right = expected(BATCH).logits
        return float((found(BATCH).logits - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_every_known_architecture(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    path = write_gguf(tmp_path / "a.gguf", name, entries_of(name, model), tensors_of(name, model))
    assert error(load_model(str(path))[0], model) < 1e-5


def with_rope(name: str, **rope: Any) -> t.PreTrainedModel:
    """A tiny model whose rotary embedding is scaled."""
    model = tiny(name)
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": {"rope_theta": 1e4, **rope}})
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def frequencies(model: torch.nn.Module) -> torch.Tensor:
    return next(b for n, b in model.named_buffers() if n.endswith("rotary_emb.inv_freq"))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_llama3_scaling_is_a_tensor(name: str, tmp_path: Path) -> None:
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model = with_rope(name, rope_type="llama3", factor=8.0, **known)
    tensors = tensors_of(name, model)
    factors = frequencies(tiny(name)) / frequencies(model)
    tensors["rope_freqs.weight"] = factors.numpy()
    path = write_gguf(tmp_path / "a.gguf", name, entries_of(name, model), tensors)
    loaded = load_model(str(path))[0]
    assert error(loaded, model) < 1e-5
    graph = capture(loaded)
    assert relative_error(graph(*inputs_for(graph, BATCH).values()), model(BATCH).logits) < 1e-5
    for strange in (0.0, -1.0, np.inf, np.nan):
        spoilt = factors.numpy().copy()
        spoilt[1] = strange
        write_gguf(path, name, entries_of(name, model), tensors | {"rope_freqs.weight": spoilt})
        with pytest.raises(CaptureError, match=r"expected finite, positive factors in rope_freqs\.weight"):
            load_model(str(path))
    tensors["rope_freqs.weight"] = np.ones(3, np.float32)
    write_gguf(path, name, entries_of(name, model), tensors)
    with pytest.raises(CaptureError, match=r"expected rope_freqs\.weight as the frequencies .* found \[3\]"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("rope", "entries"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.finetuned": True,
            },
        ),
    ],
)
def test_scaling_by_entries(rope: dict[str, Any], entries: dict[str, Any], tmp_path: Path) -> None:
    model = with_rope("llama", **rope)
    path = write_gguf(
        tmp_path / "a.gguf", "llama", entries_of("llama", model) | entries, tensors_of("llama", model)
    )
    assert error(load_model(str(path))[0], model) < 1e-5
    assert error(tiny("llama"), model) > 1e-3, "the scaling changes nothing here"


@pytest.mark.parametrize("letters", ["qkv", "qkvo"])
def test_biases_of_a_llama(letters: str, tmp_path: Path) -> None:
    plain = tiny("llama")
    model = type(plain)(type(plain.config)(**{**plain.config.to_dict(), "attention_bias": True})).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for layer in model.model.layers:
            for letter in "qkvo":
                bias = getattr(layer.self_attn, f"{letter}_proj").bias
                bias.copy_(torch.randn_like(bias) * (letter in letters))
    tensors = tensors_of("llama", model)
    if "o" not in letters:
        tensors = {k: v for k, v in tensors.items() if not k.endswith("attn_output.bias")}
    path = write_gguf(tmp_path / "a.gguf", "llama", entries_of("llama", model), tensors)
    assert error(load_model(str(path))[0], model) < 1e-5


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a scale": ("llama", {"attention.scale": 0.5}, r"has no word for .*llama\.attention\.scale = 0\.5"),
    "a soft cap": ("llama", {"attn_logit_softcapping": 9.0}, r"llama\.attn_logit_softcapping"),
    "part of a head": ("llama", {"rope.dimension_count": 8}, r"rotates 16 channels .*dimension_count is 8"),
    "a window": ("llama", {"attention.sliding_window": 8}, r"llama\.attention\.sliding_window = 8"),
    "experts": ("llama", {"expert_count": 8}, r"llama\.expert_count = 8"),
    "scaling": ("llama", {"rope.scaling.type": "ntk"}, r"llama\.rope\.scaling\.type = ntk"),
    "YaRN's factor": ("llama", {"rope.scaling.attn_factor": 0.5}, r"rope\.scaling\.attn_factor = 0\.5"),
    "not causal": ("qwen2", {"attention.causal": False}, r"qwen2\.attention\.causal = False"),
    "anything": ("qwen3", {"unheard_of": 1}, r"qwen3\.unheard_of = 1"),
    "how many experts": ("qwen3moe", {"expert_used_count": None}, r"the entry qwen3moe\.expert_used_count"),
    "nothing": ("llama", {"block_count": None}, r"expected the entry llama\.block_count"),
    "other heads": (
        "llama",
        {"attention.head_count_kv": 4},
        r"expected .*k_proj\.weight as \[64, 32\].* found \[32",
    ),
}


@pytest.mark.parametrize(("name", "entries", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_entries_that_nothing_reads(name: str, entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny(name)
    path = write_gguf(tmp_path / "a.gguf", name, entries_of(name, model) | entries, tensors_of(name, model))
    with pytest.raises(CaptureError, match=message):
        load_model(str(path))


OTHERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "a description": ({"general.description": "x"}, None),
    "an importance matrix": ({"quantize.imatrix.file": "x"}, None),
    "parts": ({"split.count": 2}, r"one of 2 parts \(split\.count\)"),
    "an adapter": ({"general.type": "adapter"}, "found a adapter of 'llama'"),
    "words": ({"tokenizer.ggml.pre": "unheard"}, r"tokenizer\.ggml\.pre of .* is 'unheard'"),
    "a space": ({"tokenizer.ggml.add_space_prefix": True}, r"tokenizer\.ggml\.add_space_prefix"),
    "a token": (
        {"tokenizer.ggml.unheard_token": 3},
        r"nothing reads the entry tokenizer\.ggml\.unheard_token",
    ),
    "a stranger": ({"clip.vision": 3}, r"nothing reads the entry clip\.vision"),
}


@pytest.mark.parametrize(("others", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_entries_beside_the_model(others: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    model = tiny("llama")
    entries, tensors = entries_of("llama", model), tensors_of("llama", model)
    path = write_gguf(tmp_path / "a.gguf", "llama", entries, tensors, others)
    if message is None:
        assert error(load_model(str(path))[0], model) < 1e-5
        return
    with pytest.raises(CaptureError, match=message):
        load_model(str(path))


def test_tensors_that_nothing_reads(tmp_path: Path) -> None:
    model = tiny("llama")
    tensors = tensors_of("llama", model)
    tensors["blk.0.attn_sinks.weight"] = np.ones(4, np.float32)
    path = write_gguf(tmp_path / "a.gguf", "llama", entries_of("llama", model), tensors)
    with pytest.raises(
        CaptureError, match=r"a llama of transformers does not read blk\.0\.attn_sinks\.weight"
    ):
        load_model(str(path))
    del tensors["blk.0.attn_sinks.weight"], tensors["blk.1.ffn_up.weight"]
    write_gguf(path, "llama", entries_of("llama", model), tensors)
    with pytest.raises(CaptureError, match=r"found none: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(path))


def test_half_of_a_merged_tensor_is_named(tmp_path: Path) -> None:
    model = tiny("qwen3moe")
    tensors = tensors_of("qwen3moe", model)
    del tensors["blk.0.ffn_gate_exps.weight"]
    path = write_gguf(tmp_path / "a.gguf", "qwen3moe", entries_of("qwen3moe", model), tensors)
    with pytest.raises(CaptureError, match=r"expected the tensor blk\.0\.ffn_gate_exps in"):
        load_model(str(path))


def test_unknown_architectures_are_refused_at_once(tmp_path: Path) -> None:
    model = tiny("llama")
    entries, tensors = entries_of("llama", model), tensors_of("llama", model)
    path = write_gguf(tmp_path / "a.gguf", "bloom", entries, tensors)
    with pytest.raises(CaptureError, match=r"of the architecture gemma2, .* found a model of 'bloom'"):
        load_model(str(path))


def test_ends_and_beginnings_of_texts(tmp_path: Path) -> None:
    model = tiny("llama")
    entries, tensors = entries_of("llama", model), tensors_of("llama", model)
    more: dict[str, Any] = {"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eom_token_id": 5}
    path = write_gguf(tmp_path / "a.gguf", "llama", entries, tensors, more)
    loaded, tokenizer = load_model(str(path))
    assert loaded.generation_config.eos_token_id == [1, 4, 5]
    assert tokenizer("ab").input_ids == [len(TOKENS) - 1]
    write_gguf(path, "llama", entries, tensors, {"tokenizer.ggml.add_bos_token": True})
    loaded, tokenizer = load_model(str(path))
    assert loaded.generation_config.eos_token_id == 1
    assert tokenizer("ab").input_ids == [0, len(TOKENS) - 1]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = t.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("ab a12").input_ids == tokenizer("ab a12").input_ids


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a file by its place alone would be the model that stood there before."""
    model = tiny("llama")
    path = write_gguf(tmp_path / "a.gguf", "llama", entries_of("llama", model), tensors_of("llama", model))
    made = []
    theirs = gguf.gguf_reader.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.gguf_reader.GGUFReader, "__init__", lambda self, *a: (made.append(a), theirs(self, *a))[0]
    )
    load_outline(str(path))
    assert error(load_model(str(path))[0], model) < 1e-5
    assert len(made) == 1
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    write_gguf(path, "llama", entries_of("llama", model), tensors_of("llama", model))
    assert error(load_model(str(path))[0], model) < 1e-5
