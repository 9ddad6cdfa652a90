"""LearnScales makes the loss of rounded weights less; moves only scales and gains, as kernels hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference, randomized, tokens_for
from sharp import sharp, windows
from torch import Tensor, fx
from torch.nn import functional as F

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    LearnScales,
    QuantizeActivations,
    QuantizeWeights,
    Rotate,
    apply_passes,
    history,
)
from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.errors import PassError, PassOrderError
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.running import run
from rolora_passes.learning import loop
from rolora_passes.passes.base import Calibration, Pass

ROUND = [QuantizeWeights(bits=3, group_size=None, clip_search=True), FoldConstants()]


def learn(round_: list[Pass], work: Path | None = None, **options: Any) -> fx.GraphModule:
    step = LearnScales(**{"steps": 4, "batch": 4, **options})
    return apply_passes(sharp(), [*round_, step], calibration=Calibration(windows(), work))


def kl(graph: fx.GraphModule, tokens: Tensor) -> float:
    wanted, found = (F.log_softmax(run(g, tokens).flatten(0, 1), -1) for g in (sharp(), graph))
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean").item()


def scales(graph: fx.GraphModule) -> dict[str, Tensor]:
    return {name: value for name, value in parameters(graph).items() if name.endswith("_scale")}


def gains(graph: fx.GraphModule) -> dict[str, Tensor]:
    return {name: value for name, value in parameters(graph).items() if name.endswith("_gain")}


@pytest.mark.parametrize("loss", ["distillation", "cross-entropy"])
def test_the_loss_falls_and_only_scales_move(loss: str) -> None:
    rounded = apply_passes(sharp(), ROUND)
    graph = learn(ROUND, loss=loss, steps=30, batch=16, lr=1e-2)
    report = history(graph)[-1].report
    losses = report.notes["losses"]
    assert len(losses) == 30 and losses[-1] < losses[0] * (0.8 if loss == "distillation" else 1)
    if loss == "distillation":
        unseen = tokens_for(sharp(), 16, 24, seed=5)
        assert kl(graph, unseen) < 0.95 * kl(rounded, unseen)
    before, after = parameters(rounded), parameters(graph)
    assert before.keys() == after.keys() and len(report.changed) == len(scales(graph)) == 15
    for name in before:  # the norms of this graph have gains, which stay as they are
        assert torch.equal(before[name], after[name]) != name.endswith("_scale"), name


@pytest.mark.parametrize("method", ["rtn", "nf"])
def test_scales_of_groups_are_what_kernels_hold(method: Any) -> None:
    graph = learn([QuantizeWeights(group_size=8, method=method), FoldConstants()])
    for scale in scales(graph).values():
        assert scale.shape[-1] > 1 and torch.equal(scale, scale.bfloat16().float())


def test_scales_that_do_not_move_are_the_scales_that_were() -> None:
    before, after = scales(apply_passes(sharp(), ROUND)), scales(learn(ROUND, lr=1e-12, steps=1))
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "phi3"])
def test_norms_whose_gains_were_fused_get_others(name: str) -> None:
    """Where linears alone read them: not a norm of queries, nor one before a sum."""
    fused = apply_passes(sharp(name), [FuseNorm(), *ROUND])
    still = {"steps": 1, "batch": 4, "lr": 1e-12, "loss": "cross-entropy"}
    graph = apply_passes(fused, [LearnScales(**still)], calibration=windows())
    found = gains(graph)
    assert len(found) == 5  # two a layer, one before the head
    tokens = tokens_for(fused, 2, 8)
    torch.testing.assert_close(run(graph, tokens), run(fused, tokens), rtol=1e-4, atol=1e-4)
    assert not gains(apply_passes(fused, [LearnScales(**still, gains=False)], calibration=windows()))


def test_gains_make_the_loss_less_than_scales_alone() -> None:
    unseen = tokens_for(sharp(), 16, 24, seed=5)
    options = {"steps": 30, "batch": 16, "lr": 1e-2}
    alone, both = (learn([FuseNorm(), *ROUND], gains=g, **options) for g in (False, True))
    assert kl(both, unseen) < 0.95 * kl(alone, unseen)
    reports = [line for line in history(both)[-1].report.changed if line.endswith("gain of the input")]
    assert len(reports) == 11 and "lm_head: gain of the input" in reports


def test_adapters_are_carried_past_gains(tmp_path: Path) -> None:
    adapted = randomized(apply_passes(sharp(), [AddLoRA(rank=2)]), "lora_")
    save_adapter(adapted, tmp_path / "there")
    attach = AddLoRA(adapter=tmp_path / "there")
    before = [FuseNorm(), Rotate(), FoldConstants(), *ROUND]
    without = parameters(apply_passes(sharp(), [*before, attach]))
    graph = learn([*before], lr=0.1)
    graph = apply_passes(graph, [attach])
    with_gains, found = parameters(graph), gains(graph)
    key = "model.layers.1.mlp.gate_proj.lora_A.weight"
    gain = found["model.layers.1.mlp.gate_proj.input_gain"]
    assert (gain - 1).abs().max() > 0.05
    torch.testing.assert_close(with_gains[key] * gain, without[key], rtol=1e-4, atol=1e-5)
    save_adapter(graph, tmp_path / "back")
    again = apply_passes(sharp(), [AddLoRA(adapter=tmp_path / "back")])
    assert difference(again, adapted) < 1e-4


def test_goes_on_to_the_identical_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scales(learn(ROUND))
    monkeypatch.setattr(loop, "_SAVE_SECONDS", 0.0)
    advance, count = loop._Run.advance, 0

    def stop(run: Any) -> None:
        nonlocal count
        if count == 2:
            raise KeyboardInterrupt
        count += 1
        advance(run)

    monkeypatch.setattr(loop._Run, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        learn(ROUND, tmp_path)
    monkeypatch.setattr(loop._Run, "advance", advance)
    assert len(list(tmp_path.glob("learn-scales-*.pt"))) == 1
    resumed = scales(learn(ROUND, tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_errors() -> None:
    with pytest.raises(
        PassError, match="learn-scales: expected weights that are stored on their grids, found none"
    ):
        learn(ROUND[:1])
    rounded = apply_passes(sharp(), ROUND)
    alone = [LearnScales(steps=1, batch=4)]
    with pytest.raises(
        PassError, match="learn-scales: expected the graph in floating point to distil, found none"
    ):
        apply_passes(rounded, alone, calibration=windows())
    learned = apply_passes(
        rounded, [LearnScales(steps=1, batch=4, loss="cross-entropy")], calibration=windows()
    )
    assert history(learned)[-1].report.modified
    with pytest.raises(
        PassOrderError, match="learn-scales cannot run on a graph that is already 'activations qu"
    ):
        apply_passes(rounded, [QuantizeActivations(), *alone], calibration=windows())
    with pytest.raises(PassError, match="learn-scales: lr must be above 0, found 0"):
        LearnScales(lr=0)
