"""TuneLoRA and RILQ lower the loss by the branches alone; what is held out says when to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference
from sharp import sharp, windows
from torch import fx

from rolora_passes import (
    RILQ,
    AddLoRA,
    Calibration,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    LoftQ,
    MergeLoRA,
    QuantizeWeights,
    Rotate,
    TuneLoRA,
    apply_passes,
    history,
)
from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import parameters
from rolora_passes.learning import loop

TURN = [FuseNorm(), Rotate(), InsertHadamard()]
ROUND = [QuantizeWeights(2, 8, head=None), FoldConstants()]


def notes(graph: fx.GraphModule) -> dict[str, Any]:
    return next(r.report.notes for r in history(graph) if r.name in ("tune-lora", "rilq"))


def tuned(passes: list[Any], work: Path | None = None, **data: Any) -> fx.GraphModule:
    return apply_passes(sharp(), passes, calibration=Calibration(windows(), work, **data))


@pytest.mark.parametrize("order", ["after", "before", "folded"])
def test_lora_before_and_after_rotation(order: str) -> None:
    add, tune = AddLoRA(rank=4), TuneLoRA(steps=12, batch=8, lr=1e-2)
    graph = tuned(
        {
            "after": [*TURN, FoldConstants(), add, tune],
            "before": [add, tune, *TURN, FoldConstants()],
            "folded": [add, *TURN, tune, FoldConstants()],  # trained through what rotate wrote
        }[order]
    )
    losses = notes(graph)["losses"]
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    merged = apply_passes(graph, [MergeLoRA(), FoldConstants()])
    assert difference(merged, graph) < 1e-4
    assert difference(graph, sharp()) > 1e-2


def test_the_base_stays() -> None:
    graph = tuned([AddLoRA(rank=2), TuneLoRA(steps=2, batch=4)])
    before = parameters(sharp())
    for name, value in parameters(graph).items():
        assert "lora_" in name or torch.equal(value, before[name])


def test_labels_are_what_is_predicted() -> None:
    """With half of the labels left out the loss is that of the others, and parts do not change it."""
    labels = windows().clone()
    labels[:, 12:] = -100
    labels[::2, :6] = -100
    passes = [AddLoRA(rank=2), TuneLoRA(steps=1, batch=4)]
    (loss,) = notes(tuned(passes, labels=labels))["losses"]
    with torch.no_grad():
        logits = sharp()(windows()[:4], torch.arange(24).expand(4, -1))
    chosen = labels[:4, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), chosen.flatten())
    assert loss == pytest.approx(float(expected), rel=1e-5)
    in_parts = [AddLoRA(rank=2), TuneLoRA(steps=1, batch=4, accumulate=4)]
    assert notes(tuned(in_parts, labels=labels))["losses"][0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("loss", ["hidden", "logits", "distillation", "cross-entropy"])
def test_rilq_makes_up_for_rounding(loss: str) -> None:
    rilq = RILQ(loss=loss, steps=30, batch=8, lr=1e-2, validation=0.25, evaluate_every=10)
    graph = tuned([*TURN, FoldConstants(), *ROUND, AddLoRA(rank=4), rilq])
    losses, held = notes(graph)["losses"], notes(graph)["validation"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]) and [n for n, _ in held] == [10, 20, 30]
    if loss == "distillation":
        alone = tuned([*TURN, FoldConstants(), *ROUND])
        assert difference(graph, sharp()) < difference(alone, sharp())


def test_from_loftq() -> None:
    loftq, rilq = LoftQ(2, 8, rank=4), RILQ(steps=10, batch=8, lr=3e-3, evaluate_every=5)
    graph = tuned([*TURN, FoldConstants(), loftq, FoldConstants(), rilq])
    losses = notes(graph)["losses"]
    zero = tuned([*TURN, FoldConstants(), *ROUND, AddLoRA(rank=4), rilq])
    assert losses[-1] < losses[0] and losses[0] != notes(zero)["losses"][0]


def test_stops_where_it_no_longer_helps_and_keeps_the_best() -> None:
    """A rate that is far too high: the held-out loss only rises after the first look."""
    tune = TuneLoRA(
        steps=40, batch=4, lr=1.0, schedule="constant", validation=0.25, evaluate_every=1, patience=2
    )
    graph = tuned([AddLoRA(rank=2), tune])
    held = dict(notes(graph)["validation"])
    best = notes(graph)["best"]
    assert held[best] == min(held.values())
    assert len(held) == best + 2 < 40 and len(notes(graph)["losses"]) == best + 2
    again = tuned(
        [AddLoRA(rank=2), TuneLoRA(steps=best, batch=4, lr=1.0, schedule="constant", validation=0.25)]
    )
    for name, value in parameters(again).items():
        assert torch.equal(value, parameters(graph)[name])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_goes_on_to_the_identical_result(
    dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = [
        AddLoRA(rank=2),
        TuneLoRA(steps=6, batch=4, lr=1e-2, dropout=dropout, validation=0.25, evaluate_every=2),
    ]
    whole = tuned(passes, tmp_path / "whole")
    monkeypatch.setattr(loop, "_SAVE_SECONDS", 0.0)

    def interrupt(name: str, done: int, total: int) -> None:
        if name.startswith("tune-lora") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(passes, tmp_path / "work", on_progress=interrupt)
    resumed = tuned(passes, tmp_path / "work")
    assert notes(resumed)["losses"] == notes(whole)["losses"]
    assert notes(resumed)["validation"] == notes(whole)["validation"]
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], value)


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"finite loss .* the state before it is in .*tune-lora-"):
        tuned([AddLoRA(rank=2), TuneLoRA(steps=30, batch=4, lr=1e30, clip=1e30)], tmp_path)
    (kept,) = tmp_path.glob("tune-lora-*.pt")
    state = torch.load(kept, weights_only=True)
    assert 0 < state["step"] < 30 and all(v.isfinite().all() for v in state["variables"].values())


def test_on_quantized_weights_as_qlora() -> None:
    graph = tuned([*ROUND, AddLoRA(rank=4), TuneLoRA(steps=10, batch=8, lr=1e-2, bfloat16=True)])
    assert notes(graph)["losses"][-1] < notes(graph)["losses"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "dropout must be from 0"),
        ({"schedule": "cosin"}, "expected a schedule of .*, found 'cosin'"),
        ({"validation": 1.0}, "validation must be from 0"),
        ({"evaluate_every": 0}, "evaluate_every must be 1 or more"),
        ({"loss": "mse"}, "expected a loss of .*, found 'mse'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        TuneLoRA(**options)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(
        PassError, match="expected low-rank branches to train, found none: run add-lora first"
    ):
        tuned([TuneLoRA(steps=1)])
    with pytest.raises(PassError, match="expected the graph in floating point to distil"):
        rounded = apply_passes(sharp(), [*ROUND, AddLoRA(rank=2)])
        apply_passes(rounded, [RILQ(steps=1)], calibration=windows())
    with pytest.raises(PassError, match="no token to predict"):
        tuned([AddLoRA(rank=2), TuneLoRA(steps=1)], labels=torch.full_like(windows(), -100))
    with pytest.raises(PassError, match="expected labels like the tokens"):
        tuned([AddLoRA(rank=2), TuneLoRA(steps=1)], labels=windows()[:2])
