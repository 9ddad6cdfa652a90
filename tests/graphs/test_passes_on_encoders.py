"""The passes work on encoders, and on encoders with a decoder, by structure."""

from __future__ import annotations

import pytest
import torch
from architectures import chosen
from helpers import captured, check, check_exact, check_idempotent, count, difference, randomized, tokens_for
from torch import Tensor, fx

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    MergeLoRA,
    ObserveActivations,
    QuantizeActivations,
    QuantizeWeights,
    Rotate,
    SmoothQuant,
    apply_passes,
    history,
)
from rolora_passes.errors import RoloraError
from rolora_passes.graphs.bases.inference import infer_bases
from rolora_passes.graphs.graph import linears
from rolora_passes.graphs.running import values
from rolora_passes.passes.add_kv_cache import AddKVCache
from rolora_passes.quantize.stages import Stages

ALL = Rotate(residual="orthogonal", heads="orthogonal", others="orthogonal")
LORA = AddLoRA(rank=2)
# Free classes by kind after FuseNorm: between values and output projection, and between queries and keys.
FREE = {
    "bert": (2, 2, 0), "bert-bare": (2, 2, 0), "bert-classifier": (2, 2, 0), "modernbert": (2, 0, 0),
    "deberta": (0, 0, 2), "bart": (6, 6, 0), "mbart": (6, 6, 0),
}  # fmt: skip


def windows(graph: fx.GraphModule) -> Tensor:
    return tokens_for(graph, 4, 16)


@pytest.mark.parametrize("name", chosen(FREE))
def test_norms_are_fused_where_they_can(name: str) -> None:
    graph = check_exact(captured(name), [FuseNorm()])
    report = history(graph)[-1].report
    assert all(reason for _, reason in report.left)
    assert len(report.left) + len(report.changed) > 0
    check_exact(graph, [FoldConstants()])


@pytest.mark.parametrize("name", chosen(FREE))
def test_every_free_class_rotates(name: str) -> None:
    fused = apply_passes(captured(name), [FuseNorm()])
    kinds = [cls.kind for cls in infer_bases(fused).classes if cls.free]
    assert tuple(kinds.count(kind) for kind in ("head", "query-key", "inner")) == FREE[name]
    rotated = check_exact(fused, [ALL])
    assert len(history(rotated)[-1].report.changed) == len(kinds)
    check_exact(rotated, [FoldConstants()])


@pytest.mark.parametrize("name", chosen(FREE))
def test_adapters_before_and_after_rotation(name: str) -> None:
    adapted = randomized(check_exact(captured(name), [LORA]), "lora_B")
    assert len(history(adapted)[-1].report.changed) >= len(linears(captured(name))) - 1
    check_exact(adapted, [FuseNorm(), ALL, FoldConstants()])
    check_exact(adapted, [MergeLoRA(), FoldConstants()])
    check_exact(captured(name), [FuseNorm(), ALL, LORA, FoldConstants()])


@pytest.mark.parametrize("name", chosen(FREE))
def test_hadamards_before_down_projections(name: str) -> None:
    graph = check_exact(captured(name), [FuseNorm(), InsertHadamard()])
    assert count(graph, "hadamard") >= 2


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta", "bart"])
def test_weights_and_activations_are_quantized(name: str) -> None:
    graph = captured(name, torch.float32)
    steps = [QuantizeWeights(bits=8, group_size=None, head=8), QuantizeActivations(), FoldConstants()]
    eight = check(graph, steps)
    sites = len(linears(graph))
    assert count(eight, "dequantize") == sites == len(history(eight)[0].report.changed)
    assert count(eight, "fake_quantize") > 0
    check_idempotent(eight, FoldConstants())
    two = check(graph, [QuantizeWeights(bits=2, group_size=None, head=2)])
    assert 0 < difference(eight, graph) < difference(two, graph)


@pytest.mark.parametrize("name", ["bert", "bert-classifier", "deberta", "bart"])
def test_passes_that_look_at_data(name: str) -> None:
    graph = captured(name)
    steps = [ObserveActivations(per="channel"), SmoothQuant()]
    smooth = apply_passes(graph, steps, calibration=windows(graph))
    assert difference(smooth, graph) < 1e-10 and history(smooth)[-1].report.changed
    rounded, best = (
        apply_passes(
            captured(name, torch.float32),
            [QuantizeWeights(bits=4, group_size=None, method=method)],
            calibration=windows(graph),
        )
        for method in ("rtn", "gptq")
    )
    assert count(best, "dequantize") == count(rounded, "dequantize") == len(linears(graph))
    assert difference(best, captured(name, torch.float32)) < 1


@pytest.mark.parametrize("name", ["bert", "deberta", "bart"])
def test_a_cache_is_for_decoders(name: str) -> None:
    with pytest.raises(RoloraError, match="tokens, positions"):
        apply_passes(captured(name), [AddKVCache(max_length=16)])


@pytest.mark.parametrize("name", ["bert", "deberta", "bart"])
def test_windows_in_stages_are_the_windows_alone(name: str) -> None:
    graph = captured(name)
    tokens = windows(graph)
    alone = [dict(values(graph, window)) for window in tokens.split(1)]
    stages = Stages(graph, tokens)
    for node in linears(graph)[::4]:
        for found, window in zip(stages.advance(node), alone, strict=True):
            assert torch.equal(found, window[node])
