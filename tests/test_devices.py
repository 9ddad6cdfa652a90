"""Every pass, and what is learned, measured and shown, on a device: no tensor of the CPU strays there.

The device is `simulated`. Where a graph lies on it, and where a graph lies on the CPU and is computed on it,
the results are those of the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import tiny_wide
from helpers import tokens_for
from simulated import DEVICE, StrayTensor, without
from torch import fx

from rolora_passes import Calibration, apply_passes, history
from rolora_passes.evaluation import GraphScorer, perplexity
from rolora_passes.graphs import computing_on, devices, run, running, to_device
from rolora_passes.graphs import evaluate as evaluation
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import parameters, set_tensor
from rolora_passes.graphs.info import info
from rolora_passes.numerics import exact
from rolora_passes.passes.manager import PassLike
from rolora_passes.passes.registry import PASSES

_ROUNDED: list[PassLike] = ["fuse-norm", {"quantize-weights": {"group_size": 32}}]
_TRAIN = {"steps": 2, "batch": 2, "under": "W8A8"}
_OPEN: list[PassLike] = [
    "fuse-norm",
    {"insert-scaling": {"balance": True}},
    {"rotate": {"heads": "orthogonal"}},
]
# What stands before a pass for it to find a site, and its options: those that compute most.
PIPELINES: dict[str, list[list[PassLike]]] = {
    "fuse-norm": [["fuse-norm"], [{"fuse-norm": {"tied": "keep"}}]],
    "insert-scaling": [_OPEN[:2], ["fuse-norm", "insert-scaling"]],
    "rotate": [["fuse-norm", "rotate"], ["fuse-norm", {"rotate": {"residual": "orthogonal"}}]],
    "insert-hadamard": [["insert-hadamard"], [{"insert-hadamard": {"factors": True}}]],
    "learn-rotation": [
        [
            *_OPEN,
            {"insert-hadamard": {"factors": True}},
            {"learn-rotation": {**_TRAIN, "method": method, **more}},
        ]
        for method, more in (
            ("cayley-adam", {"validation": 0.4, "evaluate_every": 1}),
            ("cayley-sgd", {"recompute": True, "loss": "cross-entropy"}),
        )
    ],
    "learn-scales": [[*_ROUNDED, "fold-constants", {"learn-scales": _TRAIN}]],
    "add-lora": [[{"add-lora": {"rank": 4, "init": init}}] for init in ("gaussian", "svd")]
    + [[*_ROUNDED, {"add-lora": {"rank": 4, "init": "loftq"}}]],
    "tune-lora": [
        [{"add-lora": {"rank": 4}}, *_ROUNDED, "fold-constants", {"tune-lora": {**_TRAIN, "dropout": 0.0}}]
    ],
    "rilq": [[{"add-lora": {"rank": 4}}, *_ROUNDED, "fold-constants", {"rilq": _TRAIN}]],
    "loftq": [["fuse-norm", {"loftq": {"rank": 4, "grid": grid}}] for grid in ("nf", "int")],
    "merge-lora": [[{"add-lora": {"rank": 4, "init": "gaussian"}}, "merge-lora"]],
    "observe-activations": [
        [{"observe-activations": {"method": method}}] for method in ("minmax", "percentile", "histogram")
    ],
    "smooth-quant": [[{"observe-activations": {"per": "channel"}}, "smooth-quant"]],
    "quantize-weights": [
        _ROUNDED,
        ["fuse-norm", {"quantize-weights": {"grid": "nf", "group_size": 32}}],
        ["fuse-norm", {"quantize-weights": {"method": "gptq", "act_order": True}}],
    ],
    "quantize-activations": [
        [*_ROUNDED, {"quantize-activations": {"clip_search": True}}],
        ["observe-activations", *_ROUNDED, {"quantize-activations": {"static": True}}],
    ],
    "quantize-kv-cache": [["quantize-kv-cache"]],
    "quantize-embedding": [["quantize-embedding"]],
    "fold-constants": [["fuse-norm", "rotate", "fold-constants"], [*_ROUNDED, "fold-constants"]],
    "add-kv-cache": [["add-kv-cache"]],
}
CASES = [
    pytest.param(steps, id=f"{name}-{number}")
    for name in PASSES
    for number, steps in enumerate(PIPELINES.get(name, [[name]]))
]


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return capture(tiny_wide())


def places(graph: fx.GraphModule) -> set[str]:
    return {value.device.type for value in parameters(graph).values()}


def require_equal(found: fx.GraphModule, expected: fx.GraphModule) -> None:
    """Every tensor of a graph is that of another; what it remembers is on the CPU."""
    theirs = parameters(expected)
    # Kernels add in another order, transforms have other factors, and an optimiser's first steps show no more
    # than the sign of the least gradient.
    trained = any("losses" in record.report.notes for record in history(expected))
    allowed = {"rtol": 1e-4, "atol": 1e-2 if trained else 1e-5}
    assert parameters(found).keys() == theirs.keys()
    for name, value in parameters(found).items():
        assert value.dtype == theirs[name].dtype
        assert torch.allclose(value.detach().cpu().double(), theirs[name].detach().double(), **allowed), name
    kept = info(found)
    held = [r.matrix for r in kept.rotations.values()]
    held += [tensor for way in kept.ways.values() for tensor in way.tensors.values()]
    assert all(tensor.device.type == "cpu" for tensor in held)


@pytest.mark.parametrize("steps", CASES)
def test_a_pass_there_and_for_weights_that_travel(graph: fx.GraphModule, steps: list[PassLike]) -> None:
    data = Calibration(tokens_for(graph, 5, 12))
    expected = apply_passes(graph, steps, calibration=data)
    there = apply_passes(to_device(graph, DEVICE), steps, calibration=data)
    assert places(there) == {DEVICE.type}
    require_equal(there, expected)
    travelled = apply_passes(graph, steps, calibration=data, device=DEVICE)
    assert places(travelled) == {"cpu"}
    require_equal(travelled, expected)


def test_large_weights_travel_in_blocks(graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification, too, multiplies on the device what lies elsewhere."""
    for module in (evaluation, running):
        monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(evaluation, "_BLOCK", 64)
    expected = apply_passes(graph, FEW["folded"])
    require_equal(apply_passes(graph, FEW["folded"], device=DEVICE), expected)
    require_equal(apply_passes(to_device(graph, DEVICE), FEW["folded"]), expected)


FEW: dict[str, list[PassLike]] = {
    "folded": ["fuse-norm", "rotate", "insert-hadamard", "fold-constants"],
    "gptq": ["fuse-norm", {"quantize-weights": {"method": "gptq"}}],
    "smoothed": PIPELINES["smooth-quant"][0],
    "scaled": [*_OPEN, "fold-constants"],
    "learned": PIPELINES["learn-rotation"][1],
    "tuned": PIPELINES["rilq"][0],
}


@pytest.mark.parametrize("name", FEW)
def test_without_float64_exact_work_is_done_on_the_cpu(
    name: str, graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on MPS: nothing in float64 may be on the device, and nothing is computed in less than it was."""
    monkeypatch.setattr(exact, "_WITHOUT_FLOAT64", {DEVICE.type})
    data = Calibration(tokens_for(graph, 5, 12))
    with without(torch.float64):
        found = apply_passes(graph, FEW[name], calibration=data, device=DEVICE)
        logits = run(found, data.tokens)
    require_equal(found, apply_passes(graph, FEW[name], calibration=data))
    assert logits.device.type == "cpu"


@pytest.mark.parametrize("name", FEW)
def test_with_no_room_for_copies_all_travel_again(
    name: str, graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_PART", 0)
    data = Calibration(tokens_for(graph, 5, 12))
    found = apply_passes(graph, FEW[name], calibration=data, device=DEVICE)
    require_equal(found, apply_passes(graph, FEW[name], calibration=data))


def test_gptq_that_was_stopped_goes_on_elsewhere(graph: fx.GraphModule, tmp_path: Path) -> None:
    """What is finished lies in files, which no device changes."""
    steps, tokens = FEW["gptq"], tokens_for(graph, 5, 12)

    def stop(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_passes(graph, steps, calibration=Calibration(tokens, tmp_path, stop), device=DEVICE)
    assert list(tmp_path.iterdir())
    found = apply_passes(graph, steps, calibration=Calibration(tokens, tmp_path))
    resumed = [stage["resumed"] for stage in history(found)[-1].report.notes["stages"]]
    assert resumed[0] and not resumed[-1]
    require_equal(found, apply_passes(graph, steps, calibration=tokens))


def test_learning_that_was_stopped_goes_on_elsewhere(graph: fx.GraphModule, tmp_path: Path) -> None:
    steps, tokens = FEW["learned"], tokens_for(graph, 5, 12)

    def stop(name: str, done: int, total: int) -> None:
        if done == 1 and name.startswith("learn-rotation"):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rolora_passes.learning.loop._SAVE_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            apply_passes(graph, steps, calibration=Calibration(tokens, tmp_path, stop), device=DEVICE)
    assert list(tmp_path.iterdir())
    found = apply_passes(graph, steps, calibration=Calibration(tokens, tmp_path))
    require_equal(found, apply_passes(graph, steps, calibration=tokens))


def test_what_is_measured_is_that_of_the_cpu(graph: fx.GraphModule) -> None:
    stream = tokens_for(graph, 1, 64)[0]
    expected = perplexity(GraphScorer(graph), stream, 16)
    there = perplexity(GraphScorer(to_device(graph, DEVICE)), stream, 16)
    with computing_on(DEVICE):
        travelled = perplexity(GraphScorer(graph), stream, 16)
    assert [there.nll, travelled.nll] == pytest.approx([expected.nll] * 2, rel=1e-5)


def test_a_stray_tensor_is_noticed(graph: fx.GraphModule) -> None:
    """The device is as strict as CUDA: else the tests above would show nothing."""
    placed = to_device(graph, DEVICE)
    name = next(iter(parameters(placed)))
    set_tensor(placed, name, parameters(graph)[name])
    with pytest.raises(StrayTensor):
        run(placed, tokens_for(graph))
    assert run(to_device(placed, "cpu"), tokens_for(graph)).device.type == "cpu"


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_is_where_the_hardware_has_it(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert devices.has_bfloat16(torch.device("cuda")) == supported
    assert devices.has_bfloat16(torch.device("cpu"))
