"""Two processes under torchrun learn what one does, with whole layers or with their parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import matrices
from sharp import opened, sharp, windows

from rolora_passes import (
    AddLoRA,
    Calibration,
    FoldConstants,
    FuseNorm,
    LearnRotation,
    LearnScales,
    QuantizeWeights,
    TuneLoRA,
    apply_passes,
)
from rolora_passes.graphs.graph import parameters
from rolora_passes.learning import processes

# Adam makes much of gradients that are nearly nothing, and of their rounding; SGD does not.
OPTIONS = {"under": "W8A8", "method": "cayley-sgd", "lr": 1e-2, "train": "R1", "steps": 3, "batch": 4}
SCRIPT = f"""
import sys
OPTIONS = {OPTIONS}
import torch
from helpers import matrices
from sharp import opened, windows
from test_processes import scaled, tuned
from rolora_passes import LearnRotation, apply_passes
from rolora_passes.learning import processes

torch.set_num_threads(1)
held, layered = [], LearnRotation._layered

def spy(self, graph, variables):
    found = layered(self, graph, variables)
    for layer in found.layers:
        parts = [p.to_local().numel() if self.shard else p.numel() for p in layer.parameters()]
        held.append((sum(parts), sum(p.numel() for p in layer.parameters())))
    return found

LearnRotation._layered = spy
learned = {{}}
for shard in (False, True):
    step = LearnRotation(**OPTIONS, shard=shard)
    turned = matrices(apply_passes(opened(), [step], calibration=windows()))
    assert processes.count() == 2
    others = {{"scales": scaled(shard=shard), "branches": tuned(shard=shard), "held": held.copy()}}
    learned[shard] = {{"rotations": turned, **others}}
    held.clear()
torch.save(learned, f"{{sys.argv[1]}}.{{processes.rank()}}")
"""


def scaled(**options: Any) -> dict[str, torch.Tensor]:
    """What learn-scales makes of the scales of rounded weights, and of gains."""
    steps = [FuseNorm(), QuantizeWeights(3, None), FoldConstants(), LearnScales(steps=2, batch=4, **options)]
    found = parameters(apply_passes(sharp(), steps, calibration=windows()))
    return {name: value.detach() for name, value in found.items() if name.endswith(("_scale", "_gain"))}


def tuned(**options: Any) -> dict[str, torch.Tensor]:
    """Branches trained on windows that differ in how many labels they have: no mean of means is theirs."""
    labels = windows().clone()
    labels[torch.arange(24) < torch.arange(16)[:, None]] = -100
    steps = [AddLoRA(rank=2), TuneLoRA(steps=2, batch=4, **options)]
    graph = apply_passes(sharp(), steps, calibration=Calibration(windows(), labels=labels))
    return {name: value.detach() for name, value in parameters(graph).items() if "lora_" in name}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What either of two processes learned, with whole layers (False) and with their parts (True)."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "script.py").write_text(SCRIPT)
    here = Path(__file__).resolve().parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(here), str(here.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(folder / "script.py"), str(folder / "result")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"result.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """What one process learns from the same rows together."""
    step = LearnRotation(**OPTIONS, accumulate=2)  # type: ignore[arg-type]
    rotations = matrices(apply_passes(opened(), [step], calibration=windows()))
    return {"rotations": rotations, "scales": scaled(accumulate=2), "branches": tuned(accumulate=2)}


@pytest.mark.parametrize("shard", [False, True])
def test_two_are_as_one(shard: bool, both: list[Any], alone: dict[str, dict[str, torch.Tensor]]) -> None:
    first, second = (found[shard] for found in both)
    tolerances = {"rotations": (0, 1e-5), "scales": (1e-4, 0), "branches": (0, 1e-5)}
    for kind, (relative, absolute) in tolerances.items():
        for key, expected in alone[kind].items():
            assert torch.equal(first[kind][key], second[kind][key])
            torch.testing.assert_close(first[kind][key], expected, rtol=relative, atol=absolute)
    for part, whole in [*first["held"], *second["held"]]:
        assert part <= 0.6 * whole if shard else part == whole


@pytest.mark.parametrize(("gpu", "backends"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_what_carries_a_tensor_is_chosen_by_where_it_is(
    gpu: bool, backends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is summed on the CPU goes by gloo though there is a GPU; torch chooses for every tensor."""
    joined: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(processes.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(processes.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(processes.dist, "init_process_group", joined.append)
    processes.join()
    assert joined == [backends]
