"""FuseNorm moves every gain that can move, keeps the function, and says why it left the others."""

from __future__ import annotations

import pytest
from architectures import CONFIGS, chosen
from helpers import captured, check_exact, check_idempotent, count
from torch import fx

from rolora_passes import FoldConstants, FuseNorm, Rotate, apply_passes, history
from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import constants, is_op, parameters
from rolora_passes.passes import Report

LAYER_NORM = ["opt", "gpt2", "phi", "gpt_neox", "cohere", "starcoder2", "stablelm"]
# Gains that must stay: after the sublayer (Gemma 2, OLMo 2) or before rotary embedding (q and k norms).
STAY = {"qwen3": 4, "gemma2": 4, "gemma3": 8, "olmo2": 8}


def report_of(graph: fx.GraphModule, name: str = "fuse-norm") -> Report:
    return next(r.report for r in history(graph) if r.name == name)


def gains(graph: fx.GraphModule) -> list[fx.Node]:
    """Multiplications of a norm's result by something constant."""
    known = constants(graph)
    return [
        n
        for n in graph.graph.nodes
        if is_op(n, "mul") and any(is_op(a, "rms_norm", "layer_norm") for a in n.args) and known & {*n.args}
    ]


@pytest.mark.parametrize("tied", ["untie", "keep"])
@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_keeps_the_function(name: str, tied: str) -> None:
    graph = check_exact(captured(name), [FuseNorm(tied=tied)])  # type: ignore[arg-type]
    check_exact(graph, [FoldConstants()])


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_leaves_the_gains_it_reports_and_no_other(name: str) -> None:
    graph = apply_passes(captured(name), [FuseNorm()])
    report = report_of(graph)
    assert len(gains(graph)) == len(report.left) == STAY.get(name, 0), report.left
    assert all(reason for _, reason in report.left)


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_finds_nothing_left_to_do(name: str) -> None:
    check_idempotent(apply_passes(captured(name), [FuseNorm()]), FuseNorm())


@pytest.mark.parametrize("name", LAYER_NORM)
def test_layer_norms_become_rms_norms(name: str) -> None:
    before = captured(name)
    after = apply_passes(before, [FuseNorm()])
    assert count(before, "layer_norm") and not count(before, "rms_norm")
    assert count(after, "rms_norm") == count(before, "layer_norm") and not count(after, "layer_norm")


def test_rms_norms_get_no_centring() -> None:
    after = apply_passes(captured("llama"), [FuseNorm()])
    assert not count(after, "mean", "sub")


def test_what_a_llama_becomes() -> None:
    graph = apply_passes(captured("llama"), [FuseNorm()])
    norms = [n for n in graph.graph.nodes if is_op(n, "rms_norm")]
    assert [sorted(u.args[1].args[0].target.split(".")[-2] for u in n.users) for n in norms] == [
        ["k_proj", "q_proj", "v_proj"], ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"], ["gate_proj", "up_proj"], ["lm_head"],
    ]  # fmt: skip
    for norm in norms:
        for user in norm.users:
            scaled = user.args[1]
            assert is_op(user, "linear") and is_op(scaled, "mul") and "norm" in scaled.args[1].target


def test_a_post_norms_gain_is_left_with_the_reason() -> None:
    left = dict(report_of(apply_passes(captured("gemma2"), [FuseNorm()])).left)
    assert set(left) == {
        f"model.layers.{i}.{n}_layernorm.weight"
        for i in (0, 1)
        for n in ("post_attention", "post_feedforward")
    }


def test_untying_gives_the_head_its_own_table() -> None:
    graph = apply_passes(captured("llama-tied"), [FuseNorm(), FoldConstants()])
    tables = [name for name, value in parameters(graph).items() if tuple(value.shape) == (97, 24)]
    assert len(tables) == 2
    assert any("untied" in line for line in report_of(graph).changed)


def test_keeping_the_table_tied_costs_one_small_dense_matrix() -> None:
    before = captured("llama-tied")
    graph = check_exact(before, [FuseNorm(tied="keep"), Rotate(), FoldConstants()])
    shapes = [tuple(value.shape) for value in parameters(graph).values()]
    assert shapes.count((97, 24)) == 1
    assert shapes.count((24, 24)) == 1
    assert count(graph, "linear") == count(before, "linear") + 1


def test_a_layer_norm_model_cannot_keep_its_table_tied_and_says_so() -> None:
    graph = apply_passes(captured("gpt2"), [FuseNorm(tied="keep")])
    assert any("untied" in reason for _, reason in report_of(graph).left)


def test_options_are_checked() -> None:
    with pytest.raises(PassError, match="'untie' or 'keep', found 'both'"):
        FuseNorm(tied="both")  # type: ignore[arg-type]
