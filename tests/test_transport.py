"""Adapters carried into any basis, and back to PEFT: the same function on every architecture."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import CONFIGS, chosen, tiny_wide
from helpers import captured, difference, everything_in_float64, model_of, randomized, tokens_for
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    InsertScaling,
    QuantizeWeights,
    Rotate,
    apply_passes,
)
from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.adapters.peft_format import load_adapter
from rolora_passes.errors import PassError
from rolora_passes.graphs import load_graph, run, save_graph
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.lineage import ways
from rolora_passes.graphs.sites import is_head
from rolora_passes.graphs.verify import relative_error

ROTATED = [FuseNorm(), Rotate(others="orthogonal"), InsertHadamard(), FoldConstants()]


def base_of(name: str) -> PreTrainedModel:
    """A copy of a tiny model, for PEFT changes what it is given."""
    model = copy.deepcopy(model_of(name))
    model.set_experts_implementation("eager")  # others have no float64
    return model


def trained(name: str, folder: Path, rank: int = 3) -> peft.PeftModel:
    """A PEFT model with random branches on all linears but the head, saved to a folder."""
    found = {w.module for n, w in ways(captured(name)).items() if not is_head(n)}
    modules = sorted(m for m in found if isinstance(model_of(name).get_submodule(m), (nn.Linear, Conv1D)))
    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=modules, bias="none")
    model = peft.get_peft_model(base_of(name), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4)
    model.save_pretrained(str(folder))
    return model.eval()


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad(), everything_in_float64():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_a_peft_adapter_on_a_rotated_graph_and_back(name: str, tmp_path: Path) -> None:
    model = trained(name, tmp_path / "there")
    tokens = tokens_for(captured(name))
    plain = apply_passes(captured(name), [AddLoRA(adapter=tmp_path / "there")])
    rotated = apply_passes(captured(name), [*ROTATED, AddLoRA(adapter=tmp_path / "there")])
    wanted = run(plain, tokens)
    assert relative_error(wanted, run(captured(name), tokens)) > 1e-3
    assert relative_error(wanted, logits(model, tokens)) < 1e-9
    assert relative_error(run(rotated, tokens), wanted) < 1e-9
    save_adapter(rotated, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(
        base_of(name), str(tmp_path / "back"), autocast_adapter_dtype=False
    ).eval()
    assert relative_error(logits(again, tokens), logits(model, tokens)) < 1e-9


def test_a_weight_that_two_linears_read(tmp_path: Path) -> None:
    """DeBERTa's keys, of tokens and of relative positions: the model has one branch, the graph two."""
    model = trained("deberta", tmp_path / "there")
    tokens = tokens_for(captured("deberta"))
    graph = apply_passes(captured("deberta"), [AddLoRA(adapter=tmp_path / "there")])
    assert relative_error(run(graph, tokens), logits(model, tokens)) < 1e-9
    save_adapter(graph, tmp_path / "back")
    again = apply_passes(captured("deberta"), [AddLoRA(adapter=tmp_path / "back")])
    assert difference(again, graph) < 1e-9
    other = randomized(apply_passes(captured("deberta"), [AddLoRA(rank=2)]), "lora_")
    with pytest.raises(PassError, match=r"2 linears share the weight of .* their branches differ"):
        save_adapter(other, tmp_path / "other")
    with pytest.raises(PassError, match="its product with a table was folded: add the adapter before"):
        apply_passes(captured("deberta"), [FoldConstants(), AddLoRA(adapter=tmp_path / "there")])


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_a_trained_branch_comes_back_from_a_rotated_graph(name: str, tmp_path: Path) -> None:
    scaled = [FuseNorm(), InsertScaling(), Rotate(), InsertHadamard(factors=True), FoldConstants()]
    graph = randomized(apply_passes(captured(name), [*scaled, AddLoRA(rank=2)]), "lora_")
    save_adapter(graph, tmp_path / "adapter")
    plain = apply_passes(captured(name), [AddLoRA(adapter=tmp_path / "adapter")])
    assert difference(plain, captured(name)) > 1e-3
    assert difference(plain, graph) < 1e-9


@pytest.mark.parametrize("name", ["gpt_neox", "opt", "gpt2"])
def test_layer_norms(name: str, tmp_path: Path) -> None:
    """What reads a norm comes back, its bias too; what writes a mean that LayerNorm takes away cannot."""
    readers = ("query_key_value", "dense_h_to_4h", "q_proj", "v_proj", "fc1", "c_attn", "c_fc")
    graph = randomized(apply_passes(captured(name), [*ROTATED, AddLoRA(readers, rank=2)]), "lora_")
    save_adapter(graph, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_bias"]
    plain = apply_passes(captured(name), [AddLoRA(adapter=tmp_path / "adapter")])
    assert difference(plain, captured(name)) > 1e-3
    assert difference(plain, graph) < 1e-9
    whole = randomized(apply_passes(captured(name), [*ROTATED, AddLoRA(rank=2)]), "lora_")
    with pytest.raises(PassError, match="writes a mean that the model's LayerNorm takes away"):
        save_adapter(whole, tmp_path / "whole")
    first = randomized(apply_passes(captured(name), [AddLoRA(rank=2)]), "lora_")
    save_adapter(apply_passes(first, ROTATED), tmp_path / "before")


def test_branches_that_were_rotated_with_their_weights_come_back(tmp_path: Path) -> None:
    first = randomized(apply_passes(captured("qwen2"), [AddLoRA(rank=2)]), "lora_")
    save_adapter(apply_passes(first, ROTATED), tmp_path / "adapter")
    found, given = load_adapter(tmp_path / "adapter").modules, parameters(first)
    for module, branch in found.items():
        a, b = (given[f"{module}.lora_{half}.weight"] for half in "AB")
        assert relative_error(branch.b @ branch.a, b @ a) < 1e-9


def test_what_is_known_of_folded_weights_is_saved_with_the_graph(tmp_path: Path) -> None:
    trained("phi3", tmp_path / "adapter")
    save_graph(apply_passes(captured("phi3"), ROTATED), tmp_path / "graph.safetensors")
    graph = load_graph(tmp_path / "graph.safetensors")
    found = apply_passes(graph, [AddLoRA(adapter=tmp_path / "adapter")])
    assert difference(found, apply_passes(captured("phi3"), [AddLoRA(adapter=tmp_path / "adapter")])) < 1e-9


def test_onto_quantized_weights(tmp_path: Path) -> None:
    """The branch is the same function there: what it adds to a linear does not depend on the weight."""
    base = captured("llama", torch.float32)
    rounded = [*ROTATED, QuantizeWeights(8, None), FoldConstants()]
    first = randomized(apply_passes(base, [AddLoRA(rank=2)]), "lora_")
    save_adapter(first, tmp_path / "adapter")
    graph = apply_passes(base, [*rounded, AddLoRA(adapter=tmp_path / "adapter")])
    assert difference(graph, first) < 0.1 * difference(base, first)
    save_adapter(graph, tmp_path / "back")
    for module, branch in load_adapter(tmp_path / "back").modules.items():
        there = load_adapter(tmp_path / "adapter").modules[module]
        assert relative_error(branch.b @ branch.a, there.b @ there.a) < 1e-5


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    graph = randomized(apply_passes(captured("llama"), [AddLoRA("q_proj", rank=2)]), "lora_")
    return save_adapter(graph, tmp_path / "adapter")


def change(adapter: Path, **values: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return adapter


def test_in_the_graphs_own_basis(tmp_path: Path) -> None:
    graph = randomized(apply_passes(captured("llama"), [*ROTATED, AddLoRA(rank=2)]), "lora_")
    save_adapter(graph, tmp_path / "own", basis="graph")
    again = apply_passes(captured("llama"), [*ROTATED, AddLoRA(adapter=tmp_path / "own")])
    assert difference(again, graph) < 1e-12
    other = [FuseNorm(), Rotate(seed=1, others="orthogonal"), InsertHadamard(), FoldConstants()]
    with pytest.raises(PassError, match=r"in the basis of this graph .* save it with basis='model'"):
        apply_passes(captured("llama"), [*other, AddLoRA(adapter=tmp_path / "own")])


def test_of_another_base(adapter: Path) -> None:
    with pytest.raises(PassError, match="expected an adapter of this base"):
        apply_passes(captured("qwen2"), [AddLoRA(adapter=adapter)])
    (adapter / "rolora.json").unlink()  # as from PEFT: sizes and names are all there is
    wide = capture(tiny_wide())
    with pytest.raises(
        PassError, match=r"q_proj for 64 x 64, found one for 32 x 24: it was trained on another"
    ):
        apply_passes(wide, [AddLoRA(adapter=adapter)])
    with pytest.raises(
        PassError, match=r"branches for 2 modules that this graph lacks, such as 'model\.layers\.0"
    ):
        apply_passes(captured("gpt2"), [AddLoRA(adapter=adapter)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA, found 'IA3'"),
        (
            {"use_dora": True},
            "found 'use_dora', DoRA scales weights by their norms; merge it with PEFT first",
        ),
        ({"modules_to_save": ["lm_head"]}, "expected modules_to_save to be names .* found 'lm_head'"),
        ({"bias": "some"}, "expected bias to be none, all or lora_only, found 'some'"),
        ({"r": 3}, "expected rank 3 of model.layers.0.self_attn.q_proj, found 2"),
        ({"target_modules": ["q_proj", "k_proj"]}, "expected target_modules to be names .* found 'k_proj'"),
    ],
)
def test_adapters_that_are_refused(values: dict[str, Any], message: str, adapter: Path) -> None:
    with pytest.raises(PassError, match=message):
        load_adapter(change(adapter, **values))


def test_damaged_adapters(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"found no adapter_config\.json"):
        load_adapter(tmp_path)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * float("nan")}, weights)
    with pytest.raises(PassError, match="NaN or infinite"):
        load_adapter(adapter)
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(PassError, match=r"expected A \[rank, in\] and B \[out, rank\]"):
        load_adapter(adapter)
    save_file({**tensors, "model.embed_tokens.lora_embedding_A": tensors[name].clone()}, weights)
    with pytest.raises(PassError, match=r"expected tensors that end in lora_A\.weight"):
        load_adapter(adapter)
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(PassError, match="is damaged"):
        load_adapter(adapter)


def test_what_cannot_be_carried_back(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="found none: run add-lora first"):
        save_adapter(captured("llama"), tmp_path / "adapter")
    graph = apply_passes(captured("llama"), [AddLoRA("q_proj", rank=2, init="svd")])
    with pytest.raises(PassError, match="is no longer the model's"):
        save_adapter(graph, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
