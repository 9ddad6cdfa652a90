"""Every tensor of a checkpoint is read, has no effect, or is named in a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from tiny_checkpoint import character_tokenizer, save_checkpoint

from rolora_passes.errors import CaptureError
from rolora_passes.loading.models import load_model, load_outlined, load_tokenizer

LAYER = "model.layers.0.self_attn"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "tiny")


def change(folder: Path, **tensors: torch.Tensor) -> None:
    """Put tensors into a checkpoint; dots of their names are written as `__`."""
    found = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.q_proj.bias",
        f"{LAYER}.q_proj.lora_A.default.weight",
        "model.layers.1.mlp.up_proj.weight",
        "visual.patch_embed.weight",
        "v_head.summary.weight",
        "model.norm.bias",
    ],
)
def test_a_tensor_that_nothing_reads_is_named(name: str, folder: Path) -> None:
    change(folder, **{name: torch.ones(32)})
    with pytest.raises(CaptureError, match=f"does not read {name} in .*: the model that these files hold"):
        load_model(str(folder))


def test_biases_are_read_where_the_configuration_says_so(folder: Path) -> None:
    model = load_model(str(folder))[0]
    sizes = {letter: model.get_submodule(f"{LAYER}.{letter}_proj").out_features for letter in "qkvo"}
    change(folder, **{f"{LAYER}.{letter}_proj.bias": torch.randn(n) for letter, n in sizes.items()})
    with pytest.raises(CaptureError, match=r"k_proj\.bias, .* and 1 more .*such as attention_bias"):
        load_model(str(folder))
    configure(folder, attention_bias=True)
    assert load_model(str(folder))[0].get_submodule(f"{LAYER}.q_proj").bias is not None


def test_saved_frequencies_must_be_those_that_are_computed(folder: Path) -> None:
    model = load_model(str(folder))[0]
    name = f"{LAYER}.rotary_emb.inv_freq"
    right = model.model.rotary_emb.inv_freq.clone()
    change(folder, **{name: right.half()})
    load_model(str(folder))
    change(folder, **{name: right / 2})
    with pytest.raises(CaptureError, match=rf"does not read {name}"):
        load_model(str(folder))


def test_other_shapes_and_types_are_named(folder: Path) -> None:
    configure(folder, intermediate_size=48)
    with pytest.raises(CaptureError, match=r"expected model.*as \[.*48.*\], .* found \[.*64.*\].*3 tensors"):
        load_model(str(folder))
    configure(folder, intermediate_size=64)
    weight = load_file(folder / "model.safetensors")["lm_head.weight"]
    change(folder, lm_head__weight=weight.to(torch.int8))
    with pytest.raises(CaptureError, match=r"floating-point values of lm_head\.weight .* found I8"):
        load_model(str(folder))


def test_integers_of_experts_that_are_merged_are_named(tmp_path: Path) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = t.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    t.MixtralForCausalLM(config).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    name = next(name for name in load_file(tmp_path / "model.safetensors") if "experts.1.w2" in name)
    change(tmp_path, **{name: torch.ones(32, 32, dtype=torch.uint8)})
    with pytest.raises(CaptureError, match=rf"floating-point values of {name} .* found U8"):
        load_model(str(tmp_path))


def test_a_head_of_its_own_is_used_where_the_configuration_ties(folder: Path) -> None:
    expected = load_model(str(folder))[0].lm_head.weight
    configure(folder, tie_word_embeddings=True)
    model = load_model(str(folder))[0]
    assert torch.equal(model.lm_head.weight, expected)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.config.tie_word_embeddings is False


def test_a_configuration_of_a_larger_model_takes_no_memory(folder: Path) -> None:
    configure(folder, num_hidden_layers=100, intermediate_size=64)
    with pytest.raises(CaptureError, match=r"found no model\.layers\.1\..* more"):
        load_model(str(folder))
    configure(folder, num_hidden_layers=1, intermediate_size=10**9)
    with pytest.raises(CaptureError, match=r"as \[.*1000000000.*\], .* found \[.*64"):
        load_model(str(folder))


def quantized(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def adapted(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def unlisted(folder: Path) -> None:
    model = load_model(str(folder))[0]
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    save_file({"more": torch.ones(3)}, folder / "model-00009-of-00009.safetensors")


def beside(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    save_file({name: 2 * value for name, value in held.items()}, folder / "model-00001-of-00002.safetensors")


def in_parts(folder: Path, names: tuple[str, str], again: bool = False) -> None:
    """Two files of half the tensors each, and an index that lists them."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    known, half = sorted(held), len(held) // 2
    parts = [{n: held[n] for n in known[:half]}, {n: held[n] for n in known[half:]}]
    if again:
        parts[1][known[0]] = 2 * held[known[0]]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    index = {"weight_map": {n: names[i >= half] for i, n in enumerate(known)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def repeated(folder: Path) -> None:
    in_parts(folder, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), again=True)


def outside(folder: Path) -> None:
    in_parts(folder, ("model-00001-of-00002.safetensors", f"../{folder.name}-other.safetensors"))


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("this code was run",)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Code()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            beside,
            r"found lm_head\.weight, .* more in model\.safetensors and again in model-00001-of-00002\.safe",
        ),
        (
            repeated,
            r"found lm_head\.weight in model-00001-of-00002\.safe.* and again in model-00002-of-00002\.",
        ),
        (outside, r"expected files of .* found \.\./.*-other\.safetensors: mend the index$"),
        (
            pickled,
            r"_model\.bin is not a file of tensors: it is damaged, or holds more than .* as \.safetensors$",
        ),
        (quantized, r"found weights quantized with gptq \(quantization_config"),
        (adapted, r"found an adapter beside it \(adapter_config\.json\)"),
        (unlisted, r"model-00009-of-00009\.safetensors holds more, and nothing reads that file"),
    ],
)
def test_what_is_refused_before_loading(spoil: Callable[[Path], None], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(CaptureError, match=message):
        load_model(str(folder))


def test_parts_of_other_models_that_a_class_leaves_out(tmp_path: Path) -> None:
    """Layers that draft tokens change no logits, and the class says so."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    known = t.Qwen3NextConfig(**sizes, **heads, layer_types=["full_attention"], num_experts=0)
    t.AutoModelForCausalLM.from_config(known).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    change(tmp_path, mtp__fc__weight=torch.ones(3))
    load_model(str(tmp_path))


def test_a_tokenizer_needs_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert load_tokenizer(str(folder))("ab").input_ids


def test_loading_prints_nothing_of_other_libraries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    folder = save_checkpoint(tmp_path)
    logging.enable_progress_bar()
    capfd.readouterr()
    load_model(str(folder))
    load_outlined(str(folder))
    said = capfd.readouterr()
    assert "Loading weights" not in said.out + said.err
    assert logging.is_progress_bar_enabled()  # as it was
