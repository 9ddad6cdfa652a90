"""Layers are found by structure, and described once where they are alike."""

from __future__ import annotations

import pytest
import torch
from architectures import UNTIED
from goldens import check_golden
from helpers import captured
from transformers import LlamaConfig, LlamaForCausalLM

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    QuantizeActivations,
    QuantizeKVCache,
    QuantizeWeights,
    Rotate,
    apply_passes,
)
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.layers import find_layers
from rolora_passes.inspection.structure import numberless, spans, structure_text
from rolora_passes.passes.manager import PassLike

STEPS: dict[str, list[PassLike]] = {
    "plain": [],
    "rotated": [FuseNorm(), Rotate(), InsertHadamard(), AddLoRA(rank=4)],
    "quantized": [
        FuseNorm(),
        Rotate(),
        InsertHadamard(),
        QuantizeWeights(group_size=8),
        QuantizeActivations(),
        QuantizeKVCache(),
        FoldConstants(),
    ],
}


@pytest.mark.parametrize("name", STEPS)
def test_llama(name: str) -> None:
    graph = apply_passes(captured("llama", torch.float32), STEPS[name], verify=False)
    check_golden(f"structure-llama-{name}", structure_text(graph))


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "opt"])
def test_others(name: str) -> None:
    """Layers that differ (a window), operators that are no linears (experts), positions that are added."""
    check_golden(f"structure-{name}", structure_text(captured(name, torch.float32)))


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "gpt_neox", "olmo2", "phi", "phi3", "granite"])
def test_layers_of_other_architectures(name: str) -> None:
    """Two layers each, before them what embeds, and after them nothing of a layer."""
    layers = find_layers(captured(name))
    assert len(layers.layers) == 2
    for nodes in layers.layers:
        assert sum(is_op(n, "attention") for n in nodes) == 1
        assert len({n for n in nodes if is_op(n, "linear")}) in (4, 6, 7)
    assert any(is_op(n, "embedding") for n in layers.before)
    assert sum(is_op(n, "linear") for n in layers.after) == 1
    found = [n for nodes in layers.segments for n in nodes]
    assert len(found) == len(set(found))


def test_modules() -> None:
    """Sites have their own, what lies between two sites the module of both, and the rest the layer's."""
    layers = find_layers(captured("llama"))
    names = {n: layers.modules[n].removeprefix("model.layers.1").lstrip(".") for n in layers.layers[1]}
    for operators, expected in {
        ("attention", "rotary_embedding", "flatten", "unflatten"): {"self_attn"},
        ("silu",): {"mlp"},
        ("add", "rms_norm"): {""},
        ("mul",): {"input_layernorm", "post_attention_layernorm", "mlp"},
    }.items():
        assert {names[n] for n in names if is_op(n, *operators)} == expected
    assert {"self_attn.q_proj", "mlp.down_proj"} <= set(names.values())
    assert {layers.modules[n] for n in layers.after} == {"model.norm", "lm_head", ""}
    assert {layers.modules[n] for n in layers.beside} == {"model.rotary_emb"}


def test_one_layer() -> None:
    torch.manual_seed(0)
    graph = capture(LlamaForCausalLM(LlamaConfig(**{**UNTIED, "num_hidden_layers": 1})).eval())
    layers = find_layers(graph)
    assert [len(part) for part in (layers.before, layers.layers, layers.after)] == [1, 1, 3]
    assert "layer 0, model.layers.*:" in structure_text(graph)


def test_layers_that_are_not_alike_are_told_apart() -> None:
    """Mixed precision: what is different of the second layer, and nothing else."""
    steps = [FuseNorm(), QuantizeWeights(targets=("re:.*1.mlp.down_proj",), bits=3, group_size=8)]
    text = structure_text(apply_passes(captured("llama", torch.float32), steps, verify=False))
    start = text.index("layer 1,")
    assert text[start:].splitlines()[:3] == [
        "layer 1, model.layers.*: as layer 0, but",
        "  mlp.down_proj  [24, 40] 3 bits in groups of 8",
        "rms_norm",
    ]


def test_spans() -> None:
    assert spans([0, 1, 2, 3, 5, 7, 8]) == "0-3, 5, 7-8"
    assert spans([0, 2, 4, 6, 8]) == "0, 2, … 8"
    assert spans([4]) == "4"
    assert numberless("model.layers.11.mlp.experts.3: W2") == "model.layers.*.mlp.experts.*: W2"
