"""AddLoRA: before or after a rotation is the order of two passes."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS, SOME, chosen
from helpers import captured, check, check_exact, count, difference, randomized

from rolora_passes import AddLoRA, FoldConstants, FuseNorm, InsertHadamard, Rotate, apply_passes, history
from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import linears, parameters


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "gemma2", "gpt_neox"])
def test_zero_branches_keep_the_function(name: str) -> None:
    graph = check_exact(captured(name), [AddLoRA(rank=2)], tolerance=0.0)
    assert count(graph, "linear") == 3 * count(captured(name), "linear") - 2  # all but the head


@pytest.mark.parametrize("name", SOME)
def test_trained_branches_are_fused_and_rotated_with_the_weights(name: str) -> None:
    graph = randomized(apply_passes(captured(name), [AddLoRA(rank=2)]), "lora_")
    assert difference(graph, captured(name)) > 1e-3
    rotate = Rotate(residual="orthogonal", heads="orthogonal", others="orthogonal")
    check_exact(graph, [FuseNorm(), rotate, InsertHadamard(), FoldConstants()])


def test_before_or_after_rotation() -> None:
    first = check_exact(captured("llama"), [AddLoRA(rank=2), FuseNorm(), Rotate()])
    last = check_exact(captured("llama"), [FuseNorm(), Rotate(), AddLoRA(rank=2)])
    assert difference(first, last) < 1e-10
    assert len(linears(first)) == len(linears(last))


def test_gaussian_branches_change_the_function_and_say_so() -> None:
    graph = check(captured("llama"), [AddLoRA(rank=2, init="gaussian")])
    assert difference(graph, captured("llama")) > 1e-3
    assert history(graph)[-1].kind == "lossy" and history(graph)[-1].error is None


def test_the_scale_is_alpha_over_rank() -> None:
    one = apply_passes(captured("llama"), [AddLoRA(rank=2, alpha=3.0, init="gaussian")])
    assert {n.args[1] for n in one.graph.nodes if n.name.startswith("mul") and n.args[1] == 1.5} == {1.5}


def test_a_seed_draws_the_same_branches() -> None:
    a, b, c = (
        parameters(apply_passes(captured("llama"), [AddLoRA(rank=2, init="gaussian", seed=s)]))
        for s in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    assert a[name].shape == (2, 24)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 14), ("q_proj", 2), (("q_proj", "v_proj"), 4), ("re:.*layers\\.1\\.mlp.*", 3),
        ("model.layers.0.self_attn.o_proj", 1),
    ],
)  # fmt: skip
def test_targets(targets: str | tuple[str, ...], expected: int) -> None:
    graph = apply_passes(captured("llama"), [AddLoRA(targets=targets, rank=2)])
    assert len(history(graph)[-1].report.changed) == expected


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_queries_and_values_are_found_by_structure(name: str) -> None:
    graph = apply_passes(captured(name), [AddLoRA(targets=("queries", "values"), rank=2)])
    assert len(history(graph)[-1].report.changed) == 4  # of two layers


def test_a_split_projection_is_meant_by_its_whole_name() -> None:
    graph = check_exact(captured("phi3"), [AddLoRA(targets="qkv_proj", rank=2)])
    assert len(history(graph)[-1].report.changed) == 6


def test_targets_that_match_nothing() -> None:
    with pytest.raises(PassError, match="no linear matches 'wq'; sites are named like model"):
        apply_passes(captured("llama"), [AddLoRA(targets="wq")])
    with pytest.raises(PassError, match="no linear matches"):
        apply_passes(captured("llama"), [AddLoRA(targets="lm_head")])


def test_options_are_checked() -> None:
    with pytest.raises(PassError, match=r"rank 25 exceeds model\.layers\.0.* which is 32 x 24"):
        apply_passes(captured("llama"), [AddLoRA(rank=25, targets="q_proj")])
    with pytest.raises(PassError, match="positive rank"):
        AddLoRA(rank=0)
    with pytest.raises(PassError, match="init 'loft'"):
        AddLoRA(init="loft")  # type: ignore[arg-type]
