"""Bisection names planted faults: the pass, the site, and what is wrong with it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import torch
from helpers import count, tokens_for
from subjects import (
    QUANTIZED,
    ROTATED,
    recipe,
    rotated,
    twins,
    wide,
    with_noise,
    with_tensor,
    without_a_hadamard,
)
from torch import fx

from rolora_passes import Pass, Report
from rolora_passes.debugging.bisect import PassLoss, bisect_passes, bisect_recipe, bisect_sites, costliest
from rolora_passes.errors import GraphFormatError
from rolora_passes.graphs.graph import finish, parameters, set_tensor
from rolora_passes.graphs.running import run
from rolora_passes.passes.base import Calibration

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class ScaleOneWeight(Pass):
    """A planted mistake: claims to be exact."""

    def run(self, graph: fx.GraphModule) -> Report:
        set_tensor(graph, UP + ".weight", parameters(graph)[UP + ".weight"] * 100)
        finish(graph)
        return Report(changed=[UP])


def test_a_weight_scaled_by_100_after_rotation() -> None:
    bad = with_tensor(with_noise(rotated()), UP + ".weight", lambda w: w.mul_(100))
    found = bisect_sites(rotated(), bad, tokens_for(wide(), 2, 12))
    assert [fault.site for fault in found.faults] == [UP]
    assert found.sites == 16 and found.evaluations <= 7  # all, log2(16), the one, the others
    assert "its norm is 100x the good one's" in found.faults[0].differs[0]
    assert not found.diffuse and found.left < 1e-3 * found.kl


def test_a_dropped_hadamard() -> None:
    twin, quantized = twins()
    bad = without_a_hadamard(quantized, 1)
    found = bisect_sites(twin, bad, tokens_for(wide(), 2, 12))
    first = found.faults[0]
    assert first.site == DOWN and first.kl > 0.9 * found.kl
    assert "missing: hadamard" in first.differs and "additional: dequantize" in first.differs
    exact = bisect_sites(quantized, bad, tokens_for(wide(), 2, 12))
    assert [f.site for f in exact.faults] == [DOWN] and exact.left == 0
    assert exact.faults[0].differs[0] == "missing: hadamard"
    assert "bad:  linear(fake_quantize(mul_" in exact.faults[0].differs[1]
    assert re.search(r"linear\(fake_quantize\(hadamard\(mul_\d+, 128\)", exact.faults[0].differs[2])
    assert exact.faults[0].differs[3] == "its weight is the same"


def test_a_wrong_scale() -> None:
    def wrong(scale: torch.Tensor) -> None:
        scale[17, 3] *= 64

    twin, quantized = twins(groups=True)
    bad = with_tensor(quantized, DOWN + ".weight_scale", wrong)
    found = bisect_sites(quantized, bad, tokens_for(wide(), 2, 12))
    assert [fault.site for fault in found.faults] == [DOWN]
    scale, weight = found.faults[0].differs
    assert scale.startswith(f"{DOWN}.weight_scale: group 3 of row 17: scale is 64x the good graph's (")
    assert scale.endswith("1 of 256 scales differ")
    assert "worst group 3 of row 17, off by 6300.0% (median 0.0%)" in weight
    against_float = bisect_sites(twin, bad, tokens_for(wide(), 2, 12), most=1)
    assert against_float.faults[0].site == DOWN
    assert "worst group 3 of row 17" in against_float.faults[0].differs[-1]


def test_several_culprits_and_how_many_were_asked_for() -> None:
    others = [f"model.layers.0.{name}" for name in ("self_attn.v_proj", "mlp.gate_proj")]
    bad = with_noise(rotated())
    for site in (*others, DOWN):
        bad = with_tensor(bad, site + ".weight", lambda w: w.mul_(-3))
    found = bisect_sites(rotated(), bad, tokens_for(wide(), 2, 12))
    assert {fault.site for fault in found.faults} == {*others, DOWN}
    one = bisect_sites(rotated(), bad, tokens_for(wide(), 2, 12), most=1)
    assert len(one.faults) == 1 and one.left > found.left


def test_the_divergence_is_that_of_the_graphs() -> None:
    twin, quantized = twins(groups=True)
    tokens = tokens_for(wide(), 2, 12)
    found = bisect_sites(twin, quantized, tokens, most=1)
    p, q = (torch.log_softmax(run(g, tokens).double(), -1) for g in (twin, quantized))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.diffuse and len(found.faults) == 1, "no one site is to blame for rounding everywhere"
    assert json.loads(json.dumps(found.row()))["diffuse"]


def test_equal_graphs_have_no_faults() -> None:
    found = bisect_sites(rotated(), rotated(), tokens_for(wide()))
    assert (found.kl, found.faults, found.sites) == (0.0, [], 0)


def test_not_a_number_is_found_too() -> None:
    bad = with_tensor(with_noise(rotated()), UP + ".weight", lambda w: w[3].fill_(float("nan")))
    found = bisect_sites(rotated(), bad, tokens_for(wide(), 2, 12))
    assert [fault.site for fault in found.faults] == [UP]
    assert json.loads(json.dumps(found.row(), allow_nan=False))["kl"] is None


def test_graphs_of_two_models_are_refused() -> None:
    other = with_noise(rotated())
    (tokens, _) = other.graph.find_nodes(op="placeholder")
    tokens._rename("words")
    with pytest.raises(GraphFormatError, match="different inputs or outputs"):
        bisect_sites(rotated(), other, tokens_for(wide()))


def test_passes() -> None:
    steps = recipe(*ROTATED, *QUANTIZED)
    seen: list[str] = []
    losses, graph = bisect_passes(
        wide(), steps, tokens_for(wide(), 2, 12), on_pass=lambda record: seen.append(record.name)
    )
    assert [loss.name for loss in losses] == [step.name for step in steps] == seen
    assert count(graph, "fake_quantize")
    for loss in losses:
        assert loss.fault is None and (loss.kind == "lossy") == (loss.name.startswith("quantize"))
        assert (abs(loss.step) < 1e-6) == (loss.kind == "exact"), loss
    worst = costliest(losses)
    assert worst is not None and worst.name == "quantize-weights"
    assert losses[-1].kl > 1e-6 and json.dumps(losses[0].row())


def test_a_pass_that_learns_from_the_graph_before_rounding_finds_it() -> None:
    learns = {"learn-scales": {"steps": 1, "batch": 2, "lr": 0.1}}
    steps = recipe(*ROTATED, "quantize-weights", "fold-constants", learns, "quantize-activations")
    tokens = tokens_for(wide(), 2, 12)
    losses, _ = bisect_passes(wide(), steps, tokens, calibration=Calibration(tokens))
    assert losses[-2].name == "learn-scales" and losses[-2].kind == "trained" and losses[-2].step > 0


def test_the_costliest_pass_is_the_one_that_the_divergence_grows_most_by() -> None:
    def loss(name: str, kl: float, step: float, fault: str | None = None) -> PassLoss:
        return PassLoss(name, "lossy", kl, step, 0.0, fault)

    losses = [loss("a", 0.9, 0.9), loss("b", 1.8, 0.8), loss("c", 1.9, 0.95)]
    assert costliest(losses) is losses[0] and costliest([]) is None
    assert costliest([*losses, loss("d", float("nan"), float("nan"))]).name == "d"  # type: ignore[union-attr]
    assert costliest([*losses, loss("d", 1.9, 0, "wrong")]).name == "d"  # type: ignore[union-attr]


def test_an_exact_pass_that_changes_the_function_is_named() -> None:
    steps = [*recipe("fuse-norm", "fold-constants"), ScaleOneWeight(), *recipe(*QUANTIZED)]
    losses, sites = bisect_recipe(wide(), steps, tokens_for(wide(), 2, 12))
    worst = costliest(losses)
    assert worst is not None and worst.name == "scale-one-weight" and sites is None
    assert worst.fault is not None and UP in worst.fault and "first value that differs" in worst.fault


def test_a_recipe_is_bisected_over_passes_then_sites() -> None:
    stages: list[str] = []
    done: list[tuple[int, int]] = []
    losses, sites = bisect_recipe(
        wide(), recipe(*ROTATED, *QUANTIZED), tokens_for(wide(), 2, 12), on_stage=stages.append,
        on_progress=lambda number, most: done.append((number, most)),
    )  # fmt: skip
    assert len(losses) == 6 and sites is not None and sites.sites == 15
    assert stages == ["passes", "bisecting sites"]
    assert len(done) == sites.evaluations and all(number <= most for number, most in done)


def test_a_recipe_without_quantizers_has_no_sites_to_bisect() -> None:
    losses, sites = bisect_recipe(wide(), recipe(*ROTATED), tokens_for(wide()))
    assert len(losses) == 3 and sites is None
