"""LearnScales makes the loss of rounded weights less, moves scales alone, and leaves what kernels hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tokens_for
from sharp import sharp, windows
from torch import Tensor, fx
from torch.nn import functional as F

from rolora_passes import (
    FoldConstants,
    LearnScales,
    QuantizeActivations,
    QuantizeWeights,
    apply_passes,
    history,
)
from rolora_passes.errors import PassError, PassOrderError
from rolora_passes.graphs.graph import parameters, run
from rolora_passes.learning import loop
from rolora_passes.passes import Calibration, Pass

ROUND = [QuantizeWeights(bits=3, group_size=None, clip_search=True), FoldConstants()]


def learn(round_: list[Pass], work: Path | None = None, **options: Any) -> fx.GraphModule:
    step = LearnScales(**{"steps": 4, "batch": 4, **options})
    return apply_passes(sharp(), [*round_, step], calibration=Calibration(windows(), work))


def kl(graph: fx.GraphModule, tokens: Tensor) -> float:
    wanted, found = (F.log_softmax(run(g, tokens).flatten(0, 1), -1) for g in (sharp(), graph))
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean").item()


def scales(graph: fx.GraphModule) -> dict[str, Tensor]:
    return {name: value for name, value in parameters(graph).items() if name.endswith("_scale")}


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
    for name in before:
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
