"""LoftQ: quantized weights with branches are nearer to the model than quantized weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_wide
from helpers import captured, count, difference, tokens_for

from rolora_passes import AddLoRA, FoldConstants, LoftQ, MergeLoRA, QuantizeWeights, apply_passes, history
from rolora_passes.adapters.lora import find_branches, low_rank
from rolora_passes.errors import PassError
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import constants, is_op, linears, parameters
from rolora_passes.graphs.running import run
from rolora_passes.passes.registry import make_pass


def notes(graph: Any) -> dict[str, float]:
    found: dict[str, float] = history(graph)[-1].report.notes
    return found


@pytest.mark.parametrize("name", ["llama", "bart", "deberta", "opt"])
@pytest.mark.parametrize("grid", ["nf", "uniform", "int"])
def test_nearer_than_quantized_alone(name: str, grid: str) -> None:
    graph = captured(name, torch.float32)
    coarse: Any = {"grid": grid, "head": None, "group_size": 8, "bits": 2}
    alone = apply_passes(graph, [QuantizeWeights(**coarse), FoldConstants()])
    both = apply_passes(graph, [LoftQ(2, 8, grid, rank=6), FoldConstants()])
    tokens = tokens_for(graph)
    exact, plain, near = (run(g, tokens) for g in (graph, alone, both))
    assert float((near - exact).norm()) < 0.85 * float((plain - exact).norm())
    assert count(both, "dequantize", "decode") == count(alone, "dequantize", "decode")
    known = constants(both)  # DeBERTa's table of positions, whose branches are folded into what reads them
    fed = {n for n in linears(both) if is_op(n.args[1], "dequantize", "decode") and n.args[0] not in known}
    assert {branch.linear for branch in find_branches(both)} == fed != set()


def test_errors_are_those_of_the_weights() -> None:
    graph = captured("llama", torch.float32)
    whole = apply_passes(graph, [LoftQ(2, 8, rank=4, alpha=8.0, iterations=3)])
    folded, before = parameters(apply_passes(whole, [FoldConstants()])), parameters(graph)
    merged = 0.0
    for branch in find_branches(apply_passes(whole, [FoldConstants()])):
        codes, scale, table = (folded[n.target] for n in branch.linear.args[1].args[:3])
        base = torch.ops.rolora.decode(codes, scale, table)
        a, b = (folded[half.args[1].target] for half in (branch.low, branch.high))
        assert branch.scale == 2.0
        name = branch.linear.args[1].args[0].target.removesuffix("_q")
        merged += float((before[name] - base - 2.0 * b @ a).norm()) ** 2
    assert abs(merged**0.5 / notes(whole)["error"] - 1) < 1e-4
    assert notes(whole)["error"] < notes(whole)["error_quantized"]


def test_iterations_and_rank_lower_the_error() -> None:
    graph = captured("llama", torch.float32)

    def error(**options: Any) -> float:
        return notes(apply_passes(graph, [LoftQ(2, 8, **options)]))["error"]

    assert error(rank=4, iterations=5) < error(rank=4, iterations=1)
    assert error(rank=16, iterations=1) < 0.5 * error(rank=4, iterations=1)
    assert error(rank=4, alpha=1.0) == pytest.approx(error(rank=4, alpha=64.0), rel=1e-3)


def test_one_iteration_is_the_decomposition_of_what_was_lost() -> None:
    graph = captured("llama", torch.float32)
    first = apply_passes(graph, [LoftQ(2, 8, "int", rank=4, iterations=1), FoldConstants()])
    quantize = QuantizeWeights(2, 8, head=None)
    second = apply_passes(graph, [quantize, AddLoRA(rank=4, init="loftq"), FoldConstants()])
    assert difference(first, second) < 1e-5


def test_bits_between_two_and_four_are_of_the_first_layers() -> None:
    graph = apply_passes(captured("llama", torch.float32), [LoftQ(3, 8, rank=2)])
    widths = {c.split(": ")[0].split(".")[2]: c.split(": ")[1] for c in history(graph)[-1].report.changed}
    assert widths == {"0": "3 bits, rank 2", "1": "3 bits, rank 2"}
    graph = apply_passes(captured("llama", torch.float32), [LoftQ(3.5, 8, rank=2)])
    widths = {c.split(": ")[0].split(".")[2]: c.split(": ")[1] for c in history(graph)[-1].report.changed}
    assert widths == {"0": "4 bits, rank 2", "1": "2 bits, rank 2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "fp4"}, "expected the name of a grid, found 'fp4'"),
        ({"bits": 1.5}, "bits must be 2 to 8"),
        ({"bits": 4.5}, "whole above 4"),
        ({"iterations": 0}, "iterations must be 1 or more"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        LoftQ(**options)


@pytest.mark.parametrize("old", [{"method": "rtn"}, {"grid": "rtn"}])
def test_the_old_words_go_on_working(old: dict[str, str]) -> None:
    with pytest.warns(FutureWarning, match="loftq: `method: rtn` is `grid: int` now"):
        step = make_pass({"loftq": {"bits": 3, **old}})
    assert step == LoftQ(3, grid="int") and step.options() == {"bits": 3, "grid": "int"}


def test_sites_are_checked() -> None:
    graph = captured("llama", torch.float32)
    with pytest.raises(PassError, match="rank 30 exceeds"):
        apply_passes(graph, [LoftQ(4, 8, rank=30)])
    with pytest.raises(PassError, match="groups of 64 do not divide"):
        apply_passes(graph, [LoftQ(4, 64, rank=2)])
    with pytest.raises(PassError, match="no linear matches 'wq'"):
        apply_passes(graph, [LoftQ(4, 8, targets="wq", rank=2)])


def test_the_randomised_decomposition_is_as_good() -> None:
    matrix = torch.randn(200, 120, generator=torch.Generator().manual_seed(0))
    found = low_rank(matrix, 8, 0.5)  # randomised: 4 · (8 + 8) < 120
    u, s, vh = torch.linalg.svd(matrix)
    best = float((matrix - (u[:, :8] * s[:8]) @ vh[:8]).norm())
    assert float((matrix - 0.5 * found.b @ found.a).norm()) < 1.004 * best  # for a flat spectrum, the hardest
    assert float(found.a.norm()) == pytest.approx(float(found.b.norm()), rel=1e-4)


def test_merged_into_quantized_weights_or_kept() -> None:
    graph = apply_passes(capture(tiny_wide()), [LoftQ(4, 32, "int", rank=8), FoldConstants()])
    kept = apply_passes(graph, [MergeLoRA()])
    assert not history(kept)[-1].report.modified and "requantize" in history(kept)[-1].report.left[0][1]
    merged = apply_passes(graph, [MergeLoRA(requantize=True), FoldConstants()])
    assert not find_branches(merged)
    grids = [n.args[1:] for n in merged.graph.nodes if is_op(n, "dequantize")]
    assert len(grids) == 14 and {g[2] for g in grids} == {4}
    assert difference(merged, graph) < 0.2


def test_branches_of_before_are_left() -> None:
    adapted = apply_passes(captured("llama", torch.float32), [AddLoRA(rank=3)])
    report = history(apply_passes(adapted, [LoftQ(4, 8, rank=2)]))[-1].report
    assert len(report.changed) == 14
    assert sum("a low-rank branch" in reason for _, reason in report.left) == 28


@pytest.mark.parametrize("init", ["svd", "gaussian", "zero"])
def test_inits_of_add_lora(init: Any) -> None:
    graph = captured("llama")
    found = apply_passes(graph, [AddLoRA(rank=3, alpha=6.0, init=init)])
    assert AddLoRA(init=init).kind == ("trained" if init == "gaussian" else "exact")
    if init != "gaussian":
        assert difference(found, graph) < 1e-10
    if init == "svd":
        name = "model.layers.0.self_attn.q_proj"
        values, own = parameters(found), parameters(graph)
        u, s, vh = torch.linalg.svd(own[f"{name}.weight"])
        product = 2.0 * values[f"{name}.lora_B.weight"] @ values[f"{name}.lora_A.weight"]
        assert float((product - (u[:, :3] * s[:3]) @ vh[:3]).abs().max()) < 1e-9
        assert difference(apply_passes(found, [MergeLoRA(), FoldConstants()]), graph) < 1e-10


def test_loftq_needs_a_quantizer() -> None:
    with pytest.raises(PassError, match="expected a quantizer, not folded yet, on the weight of"):
        apply_passes(captured("llama", torch.float32), [AddLoRA(rank=2, init="loftq")])


def test_rank_stabilised() -> None:
    graph = apply_passes(captured("llama"), [AddLoRA(rank=4, alpha=8.0, rslora=True)])
    assert {b.scale for b in find_branches(graph)} == {4.0}
