"""After any exact passes, in any order, folded anywhere, an adapter computes what it did before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from helpers import captured, difference, randomized
from torch import fx

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    InsertScaling,
    MergeLoRA,
    ObserveActivations,
    Pass,
    Rotate,
    SmoothQuant,
    apply_passes,
)
from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.errors import RoloraError
from rolora_passes.graphs.info import info
from rolora_passes.graphs.lineage import ways

CALIBRATION = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(9))


def smoothed(alpha: float) -> list[Pass]:
    return [ObserveActivations(per="channel"), SmoothQuant(alpha=alpha)]


def drawn(draw: random.Random) -> list[list[Pass]]:
    """A sequence of steps, each some passes that keep the function."""
    kinds: list[list[Pass]] = [
        [FuseNorm()],
        [InsertScaling(balance=True)],
        *(smoothed(draw.choice((0.2, 0.5, 0.8))) for _ in range(2)),
        [Rotate(seed=draw.randrange(9), residual="orthogonal", others="orthogonal")],
        [InsertHadamard()],
        [AddLoRA(rank=2), MergeLoRA()],
        [FoldConstants()],
        [FoldConstants()],
    ]
    return [draw.choice(kinds) for _ in range(7)]


def after(graph: fx.GraphModule, steps: list[list[Pass]]) -> fx.GraphModule:
    """The graph after those steps that it takes: the order is random, and some are refused after others."""
    for step in steps:
        try:
            graph = apply_passes(graph, step, calibration=CALIBRATION)
        except RoloraError:
            continue
    return graph


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
@pytest.mark.parametrize("seed", range(4))
def test_an_adapter_after_any_sequence(name: str, seed: int, tmp_path: Path) -> None:
    base = captured(name)
    wanted = randomized(apply_passes(base, [AddLoRA(rank=2)]), "lora_", seed=seed)
    save_adapter(wanted, tmp_path)
    graph = after(base, drawn(random.Random(f"{name} {seed}")))
    found = apply_passes(graph, [AddLoRA(adapter=tmp_path)])
    assert difference(graph, base) < 1e-9
    assert difference(wanted, base) > 1e-3
    assert difference(found, wanted) < 1e-9


def test_two_smoothings_folded_each_for_itself(tmp_path: Path) -> None:
    base = captured("llama")
    wanted = randomized(apply_passes(base, [AddLoRA(rank=2)]), "lora_")
    save_adapter(wanted, tmp_path)
    graph = after(base, [smoothed(0.5), [FoldConstants()], smoothed(0.9), [FoldConstants()]])
    assert any(len(way.steps) == 2 for way in ways(graph).values())
    assert difference(apply_passes(graph, [AddLoRA(adapter=tmp_path)]), wanted) < 1e-9


def test_what_was_kept_of_a_parameter_that_is_gone_is_forgotten() -> None:
    """A branch that was rotated and merged is nothing to one that is added later under the same names."""
    rotated = apply_passes(captured("llama"), [FuseNorm(), AddLoRA(rank=2), Rotate(), FoldConstants()])
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert name in info(rotated).ways
    again = apply_passes(rotated, [MergeLoRA(), FoldConstants(), AddLoRA(rank=3)])
    assert name not in info(again).ways
    assert {t for way in ways(again).values() for t in way.tensors} == {
        t for way in info(again).ways.values() for t in way.tensors
    }
