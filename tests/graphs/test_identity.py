"""A base is known by its weights, whatever folder or type it was loaded in."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import captured, difference, model_of, randomized

from rolora_passes import AddLoRA, FoldConstants, FuseNorm, Rotate, apply_passes
from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.errors import PassError
from rolora_passes.graphs import capture, convert, load_graph, save_graph
from rolora_passes.graphs.identity import base_hash, fingerprint, is_original
from rolora_passes.graphs.info import info


def test_the_same_weights_in_any_type_under_any_name() -> None:
    wide, half = model_of("llama", torch.float32), copy.deepcopy(model_of("llama", torch.float32)).bfloat16()
    half.config._name_or_path = "somebody/elses-folder"
    first, second = capture(wide), capture(half)
    assert info(first).config["name"] != info(second).config["name"]
    assert base_hash(first) == base_hash(second) is not None
    assert is_original(convert(first, torch.bfloat16), "lm_head.weight")


def test_it_stays_whatever_passes_do_and_is_saved(tmp_path: Path) -> None:
    graph = captured("llama-tied")
    found = apply_passes(graph, [FuseNorm(), Rotate(), FoldConstants()])
    save_graph(found, tmp_path / "graph.safetensors")
    loaded = load_graph(tmp_path / "graph.safetensors")
    assert base_hash(graph) == base_hash(loaded) is not None
    assert info(loaded).tied == {"model.embed_tokens.weight": "lm_head.weight"}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert is_original(graph, name) and not is_original(loaded, name)


def test_other_weights_under_the_same_name_are_another_base(tmp_path: Path) -> None:
    adapted = randomized(apply_passes(captured("llama"), [AddLoRA(rank=2)]), "lora_")
    save_adapter(adapted, tmp_path)
    other = copy.deepcopy(model_of("llama"))
    with torch.no_grad():
        other.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(1.01)
    assert difference(apply_passes(captured("llama"), [AddLoRA(adapter=tmp_path)]), adapted) < 1e-9
    with pytest.raises(
        PassError, match=r"expected an adapter of this base .* delete the adapter's rolora\.json"
    ):
        apply_passes(capture(other), [AddLoRA(adapter=tmp_path)])


def test_an_adapter_of_an_older_version_says_what_to_do(tmp_path: Path) -> None:
    save_adapter(randomized(apply_passes(captured("llama"), [AddLoRA(rank=2)]), "lora_"), tmp_path)
    (tmp_path / "rolora.json").write_text(json.dumps({"base": "0123456789abcdef", "basis": None}))
    with pytest.raises(PassError, match=r"is of an older version.*save the adapter again; or, .* delete"):
        apply_passes(captured("llama"), [AddLoRA(adapter=tmp_path)])


def test_a_sample_sees_shapes_and_spread_values() -> None:
    values = torch.randn(40, 50)
    changed = values.clone()
    changed[:, 25:] += 1
    assert fingerprint(values) == fingerprint(values.clone().double())
    assert len({fingerprint(v) for v in (values, changed, values.reshape(50, 40))}) == 3
    assert fingerprint(torch.empty(0, 3)) != fingerprint(torch.empty(3, 0))
