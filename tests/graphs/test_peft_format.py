"""An adapter's folder is data that anybody wrote: every entry and tensor is read, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import captured, randomized
from safetensors.torch import load_file, save_file
from torch import Tensor

from rolora_passes import AddLoRA, apply_passes
from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.adapters.peft_format import _READ, _REFUSED, _WITHOUT_EFFECT, load_adapter
from rolora_passes.errors import PassError

Q = "base_model.model.model.layers.0.self_attn.q_proj"
K = "base_model.model.model.layers.0.self_attn.k_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    graph = randomized(apply_passes(captured("llama"), [AddLoRA("q_proj", rank=2)]), "lora_")
    return save_adapter(graph, tmp_path / "adapter")


def test_every_entry_of_peft_is_judged() -> None:
    """What a version of PEFT adds is refused unless it says nothing; what it has today is known by name."""
    known = _READ | _REFUSED.keys() | _WITHOUT_EFFECT
    assert set(peft.LoraConfig().to_dict()) <= known


def test_peft_defaults_are_accepted(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    given = json.loads(path.read_text())
    defaults = {k: v for k, v in peft.LoraConfig().to_dict().items() if not isinstance(v, set)}
    path.write_text(json.dumps({**defaults, "peft_type": "LORA", **given}))
    assert len(load_adapter(adapter).modules) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_new_idea": True}, "found 'use_new_idea', an entry that this version does not know"),
        ({"use_new_idea": {"x": 1}}, "found 'use_new_idea'"),
        ({"r": "2"}, "expected the rank of .* to be a whole number"),
        ({"r": True}, "expected the rank of .* to be a whole number"),
        ({"r": -1}, "expected the rank of .* to be a whole number"),
        ({"r": 10**30}, "expected rank 10+ of"),
        ({"lora_alpha": float("nan")}, "expected lora_alpha of .* to be a finite number, found nan"),
        ({"lora_alpha": 10**400}, "expected lora_alpha of .* to be a finite number"),
        ({"lora_alpha": [1]}, "expected lora_alpha of .* to be a finite number"),
        ({"rank_pattern": [3]}, "expected rank_pattern to be an object"),
        ({"rank_pattern": {"(": 2}}, "expected rank_pattern to be regular expressions"),
        ({"alpha_pattern": {"q_proj": None}}, "expected lora_alpha of .* to be a finite number"),
        ({"use_rslora": "yes"}, "expected use_rslora to be true or false, found 'yes'"),
        ({"lora_bias": True}, r"expected a bias \[out\] of B"),
        ({"init_lora_weights": ["pissa"]}, "expected init_lora_weights to be true, false or a name"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}},
            "expected loftq_config .* of 4 bits",
        ),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": "9"}}, "expected loftq_config"),
        ({"trainable_token_indices": [1]}, "expected trainable_token_indices to be of embeddings"),
        ({"target_modules": ["q_proj", "../../x"]}, r"whose tensors are in the file, found '\.\./\.\./x'"),
        ({"target_modules": ["k_proj"]}, r"PEFT ignores that of model\.layers\.0\.self_attn\.q_proj"),
        ({"target_modules": r".*layers\.0.*"}, r"PEFT ignores that of model\.layers\.1\.self_attn\.q_proj"),
        ({"target_modules": "(("}, r"expected target_modules to be a regular expression, found '\(\(: "),
        ({"target_modules": None}, "expected target_modules to be names of modules"),
        ({"target_modules": [7]}, "expected target_modules to be names of modules"),
        ({"exclude_modules": "(("}, "expected exclude_modules to be a regular expression"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, r"PEFT ignores that of model\.layers\.1"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            r"PEFT ignores that of model\.layers\.1",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
            r"PEFT ignores that of model\.layers\.0",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": "1"},
            "expected layers_to_transform to be numbers",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "("},
            "expected layers_pattern to be a regular expression",
        ),
        ({"modules_to_save": ["q_proj"]}, "PEFT ignores that of"),
        ({"modules_to_save": ["("]}, "expected modules_to_save to be a regular expression"),
        ({"peft_type": ["LORA"]}, "expected peft_type LORA"),
    ],
)
def test_entries_that_are_refused(values: dict[str, Any], message: str, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(PassError, match=message):
        load_adapter(adapter)


def test_unknown_entries_that_say_nothing_are_accepted(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    nothing = {"a": None, "b": False, "c": [], "d": {}, "e": "", "megatron_core": "megatron.core"}
    path.write_text(json.dumps(json.loads(path.read_text()) | nothing))
    assert load_adapter(adapter).modules


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({f"{Q}.lora_magnitude_vector": torch.ones(32)}, r"found '.*q_proj\.lora_magnitude_vector'"),
        ({f"{Q}.lora_A.default.weight": torch.ones(2, 24)}, r"found '.*lora_A\.default\.weight'"),
        ({f"{Q}.lora_B.bias": torch.ones(32)}, r"expected no bias of B \(lora_bias is false\)"),
        ({f"{Q}.weight": torch.ones(32, 24)}, "a name by which PEFT would not find it"),
        ({"prompt_embeddings": torch.ones(4, 24)}, "found 'prompt_embeddings'"),
        ({f"{Q}.lora_A.weight": torch.ones(2, 24, dtype=torch.int8)}, "in floating point, found torch.int8"),
        ({f"{Q}.lora_A.weight": torch.full((2, 24), float("inf"))}, "NaN or infinite"),
        ({f"{Q}.lora_A.weight": torch.ones(0, 24)}, r"found torch\.float32, \[0, 24\]"),
        ({f"{K}.original_module.weight": torch.ones(2)}, "is not a copy .* save_embedding_layers=False"),
        (
            {f"{K}.weight": torch.ones(2), f"{K}.modules_to_save.weight": torch.zeros(2)},
            "is not a copy .* save_embedding_layers=False",
        ),
        ({f"{K}.token_adapter.base_layer.weight": torch.ones(2)}, "a name by which PEFT would not find it"),
        ({f"{Q}.lora_A.weight": torch.ones(2)}, r"expected A \[rank, in\] and B \[out, rank\]"),
    ],
)
def test_tensors_that_are_refused(more: dict[str, Tensor], message: str, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), **more}, path)
    with pytest.raises(PassError, match=message):
        load_adapter(adapter)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"base_model.model.../../evil.weight": torch.ones(3)}, r"has no '\.\./\.\./evil\.weight'"),
        ({"base_model.model.__class__.weight": torch.ones(3)}, "has no '__class__.weight'"),
        ({"base_model.model.lm_head.weight": torch.ones(3, 24)}, r"lm_head.weight to be \[97, 24\], found"),
        (
            {f"base_model.model./x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"},
            "PEFT ignores that of /x",
        ),
    ],
)  # fmt: skip
def test_names_that_mean_nothing_here(more: dict[str, Tensor], message: str, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), **more}, path)
    with pytest.raises(PassError, match=message):
        apply_passes(captured("llama"), [AddLoRA(adapter=adapter)])


def test_a_module_that_the_graph_lacks(adapter: Path) -> None:
    path, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    more = {f"base_model.model./x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file({**load_file(path), **more}, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj", "/x"]}))
    with pytest.raises(PassError, match="branches for 1 modules that this graph lacks, such as '/x'"):
        apply_passes(captured("llama"), [AddLoRA(adapter=adapter)])


@pytest.mark.parametrize("rows", [torch.ones(2, 24), torch.ones(1, 23)])
def test_rows_of_tokens_are_checked(rows: Tensor, adapter: Path) -> None:
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({**load_file(weights), name: rows}, weights)
    given = json.loads(config.read_text())
    for indices in ([7, "8"], [7, 7], [-1], [1.5], {"lm_head": [1]}, None, [97][: len(rows)]):
        config.write_text(json.dumps(given | {"trainable_token_indices": indices}))
        with pytest.raises(
            PassError, match=r"trainable_token_indices|has rows|resize the model's embeddings"
        ):
            apply_passes(captured("llama"), [AddLoRA(adapter=adapter)])


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '"x"', "\udcff", '{"r": ' + "9" * 5000 + "}"])
def test_damaged_json(text: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PassError, match=r"is damaged|expected an object"):
        load_adapter(adapter)


@pytest.mark.parametrize("value", [3, ["x"], {"a": 1}])
def test_what_an_adapter_says_of_its_base_is_text(value: Any, adapter: Path) -> None:
    (adapter / "rolora.json").write_text(json.dumps({"weights": value}))
    with pytest.raises(PassError, match="expected weights to be a hash"):
        load_adapter(adapter)


def test_pickled_and_empty_files(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({}, path)
    with pytest.raises(PassError, match="expected an adapter's tensors, found none"):
        load_adapter(adapter)
    path.rename(adapter / "adapter_model.bin")
    with pytest.raises(PassError, match=r"adapter_model\.bin, which can run code .* save it as safetensors"):
        load_adapter(adapter)


def test_a_folder_with_other_files_is_not_replaced(adapter: Path, tmp_path: Path) -> None:
    graph = randomized(apply_passes(captured("llama"), [AddLoRA("q_proj", rank=2)]), "lora_")
    save_adapter(graph, adapter)  # its own again
    (adapter / "thesis.tex").write_text("years of work")
    with pytest.raises(PassError, match=r"an adapter alone in it, found thesis.tex"):
        save_adapter(graph, adapter)
    assert (adapter / "thesis.tex").is_file()
