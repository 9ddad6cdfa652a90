"""The manager checks order, verifies, keeps account, and prints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import captured
from torch import fx

import rolora_passes
from rolora_passes import (
    FoldConstants,
    FuseNorm,
    Pass,
    QuantizeWeights,
    Report,
    Rotate,
    apply_passes,
    history,
)
from rolora_passes.errors import PassError, PassOrderError, VerificationError
from rolora_passes.graphs import verify
from rolora_passes.graphs.graph import copy_graph, finish, parameters, set_tensor
from rolora_passes.graphs.text import graph_text
from rolora_passes.passes.base import Calibration
from rolora_passes.passes.manager import steps
from rolora_passes.passes.registry import PASSES, make_pass

WRONG = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class ScaleOneWeight(Pass):
    """A planted mistake: claims to be exact."""

    factor: float = 1.01

    def run(self, graph: fx.GraphModule) -> Report:
        set_tensor(graph, WRONG, parameters(graph)[WRONG] * self.factor)
        finish(graph)
        return Report(changed=[WRONG])


@dataclass(frozen=True)
class LoseTheHead(Pass):
    """Another: NaN everywhere."""

    def run(self, graph: fx.GraphModule) -> Report:
        set_tensor(graph, "lm_head.weight", parameters(graph)["lm_head.weight"] * float("nan"))
        return Report(changed=["lm_head"])


def test_a_wrong_pass_is_caught_and_located() -> None:
    with pytest.raises(VerificationError, match=rf"scale-one-weight .*first value that differs.*{WRONG}"):
        apply_passes(captured("llama"), [FuseNorm(), FoldConstants(), ScaleOneWeight()])


def test_nan_is_caught() -> None:
    with pytest.raises(VerificationError, match="lose-the-head"):
        apply_passes(captured("llama"), [LoseTheHead()])


def test_verification_can_be_left_out() -> None:
    graph = apply_passes(captured("llama"), [ScaleOneWeight()], verify=False)
    assert history(graph)[0].error is None


def test_small_mistakes_are_caught_in_float64() -> None:
    with pytest.raises(VerificationError):
        apply_passes(captured("llama"), [ScaleOneWeight(1 + 1e-6)])


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Rotate()], r"rotate requires .*'norms fused'.*run fuse-norm first"),
        ([FuseNorm(), Rotate(), Rotate(seed=1)], r"rotate cannot run on a graph that is already 'rotated'"),
        ([FuseNorm(), Rotate(), FuseNorm()], r"fuse-norm cannot run on a graph that is already 'rotated'"),
        (
            [QuantizeWeights(group_size=None), FuseNorm()],
            r"fuse-norm cannot run .*already 'weights quantized'",
        ),
        (["smooth-quant"], r"smooth-quant requires .*'activations observed'.*run observe-activations first"),
    ],
)
def test_wrong_orders_are_refused_before_anything_runs(passes: list[Any], message: str) -> None:
    ran: list[str] = []
    with pytest.raises(PassOrderError, match=message):
        apply_passes(captured("llama"), passes, on_pass=lambda record: ran.append(record.name))
    assert not ran


def test_facts_travel_with_the_graph() -> None:
    rotated = apply_passes(apply_passes(captured("llama"), ["fuse-norm"]), ["rotate"])
    with pytest.raises(PassOrderError, match="already 'rotated'"):
        apply_passes(rotated, ["rotate"])


def test_unknown_passes_and_options() -> None:
    with pytest.raises(PassError, match=r"found 'fuse-norms'; there are add-"):
        apply_passes(captured("llama"), ["fuse-norms"])
    with pytest.raises(PassError, match=r"rotate.*'angle'"):
        apply_passes(captured("llama"), [{"rotate": {"angle": 1}}])
    with pytest.raises(PassError, match="expected a pass"):
        apply_passes(captured("llama"), [{"rotate": {}, "fuse-norm": {}}])
    with pytest.raises(PassError, match="expected a pass"):
        apply_passes(captured("llama"), [3])  # type: ignore[list-item]


def test_names_are_one_everywhere() -> None:
    for name in PASSES:
        cls = PASSES[name]
        assert cls.name == name and getattr(rolora_passes, cls.__name__) is cls
        assert cls.__module__.rsplit(".", 1)[1] == name.replace("-", "_")
        assert cls.__doc__ and "Before:" in cls.__doc__ and "After" in cls.__doc__, name
        assert make_pass(name) == cls() == make_pass({name: None})


def test_names_mappings_and_objects_are_the_same() -> None:
    by_name = apply_passes(captured("llama"), ["fuse-norm", {"rotate": {"seed": 3}}])
    by_object = apply_passes(captured("llama"), [FuseNorm(), Rotate(seed=3)])
    assert graph_text(by_name) == graph_text(by_object)
    assert [r.options for r in history(by_name)] == [{}, {"seed": 3}]


def test_history_is_an_account() -> None:
    seen: list[str] = []
    graph = apply_passes(
        captured("llama"), [FuseNorm(), Rotate()], on_pass=lambda record: seen.append(record.name)
    )
    graph = apply_passes(graph, [FoldConstants()])
    records = history(graph)
    assert [r.name for r in records] == ["fuse-norm", "rotate", "fold-constants"] and seen == [
        "fuse-norm",
        "rotate",
    ]
    assert [r.nodes[1] for r in records[:-1]] == [r.nodes[0] for r in records[1:]]
    assert all(r.error is not None and r.error < 1e-10 for r in records)
    assert all(r.seconds >= 0 and r.peak_mb > 10 for r in records)
    assert json.loads(json.dumps([r.row() for r in records]))[1]["report"]["changed"]
    assert not history(captured("llama"))


def test_steps_are_applied_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every graph's logits are computed once, whatever else is verified in between."""
    computed: list[fx.GraphModule] = []
    own = verify._logits
    monkeypatch.setattr(verify, "_logits", lambda graph, *a: computed.append(graph) or own(graph, *a))
    given, passes = captured("llama"), [FuseNorm(), Rotate(), FoldConstants()]
    made = steps(given, passes)
    first = next(made)
    assert first.step == FuseNorm() and history(first.graph) == [first.record]
    assert computed == [given, first.graph]
    Rotate().verify(given, given, Report())
    rest = list(made)
    assert [applied.step for applied in rest] == passes[1:]
    assert computed == [given, first.graph, given, given, *(applied.graph for applied in rest)]
    assert graph_text(rest[-1].graph) == graph_text(apply_passes(given, passes))


@dataclass(frozen=True)
class Looks(Pass):
    """Keeps what it was given."""

    needs_calibration = True

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        seen.append(calibration.reference)
        return Report()


seen: list[fx.GraphModule | None] = []


def test_the_graph_before_anything_was_rounded_is_kept_for_what_learns_from_it() -> None:
    seen.clear()
    tokens, float32 = torch.tensor([[1, 2, 3]]), captured("llama", torch.float32)
    passes = [Looks(), FuseNorm(), FoldConstants(), QuantizeWeights(4, 8), QuantizeWeights(head=8), Looks()]
    graph = apply_passes(float32, passes, calibration=tokens)
    first, last = seen
    assert first is None and last is not None
    assert [record.name for record in history(last)] == ["looks", "fuse-norm", "fold-constants"]
    apply_passes(graph, [Looks()], calibration=tokens)
    assert seen[-1] is None


def test_an_empty_pipeline_copies() -> None:
    graph = apply_passes(captured("llama"), [])
    assert graph is not captured("llama") and graph_text(graph) == graph_text(captured("llama"))


def test_prints_what_changed(tmp_path: Path) -> None:
    apply_passes(captured("llama"), ["fuse-norm", "merge-lora"], print_graph="changed", print_to=tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["00-fuse-norm.txt"]
    text = (tmp_path / "00-fuse-norm.txt").read_text()
    assert text.startswith("--- before") and "\n-mul_4 = mul(" in text and "\n+" in text


def test_prints_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = apply_passes(captured("llama"), ["merge-lora"], print_graph="all", print_to=tmp_path / "new")
    assert (tmp_path / "new" / "00-merge-lora.txt").read_text() == graph_text(graph)
    apply_passes(captured("llama"), ["merge-lora"], print_graph="all")
    captured_text = capsys.readouterr().err
    assert "=== 00-merge-lora" in captured_text and graph_text(graph) in captured_text


def test_a_failure_is_written_down(tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        apply_passes(captured("llama"), [ScaleOneWeight()], print_to=tmp_path)
    assert (tmp_path / "00-scale-one-weight-failed.txt").read_text().startswith("model.embed_tokens.weight: ")


def test_an_exported_program_is_taken_too() -> None:
    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(13, 8)
            self.norm = torch.nn.RMSNorm(8)
            self.head = torch.nn.Linear(8, 13, bias=False)

        def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.norm(self.table(tokens)))
            return found

    tokens = torch.zeros(2, 3, dtype=torch.int64)
    dims = torch.export.Dim.AUTO
    positions = torch.arange(3).expand(2, 3)
    program = torch.export.export(
        Tiny(), (tokens, positions), dynamic_shapes=({0: dims, 1: dims}, {0: dims, 1: dims})
    )
    graph = apply_passes(program, [FuseNorm(), Rotate(), FoldConstants()])
    assert history(graph)[1].report.changed == ["residual (R1, 8, hadamard)"]


@dataclass(frozen=True)
class WriteInPlace(Pass):
    """Another: it edits tensors that the graph before, and the model, share."""

    counted: bool = True

    def run(self, graph: fx.GraphModule) -> Report:
        value = parameters(graph)[WRONG]
        with torch.no_grad():
            (value if self.counted else value.data)[0].mul_(1.5)
        return Report(changed=[WRONG])


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_a_pass_that_writes_into_a_shared_tensor_is_refused(counted: bool, verify: bool) -> None:
    graph = copy_graph(captured("llama"))
    set_tensor(graph, WRONG, parameters(graph)[WRONG].detach().clone())
    with pytest.raises(PassError, match=rf"write-in-place wrote into {WRONG}, which the graph before"):
        apply_passes(graph, [WriteInPlace(counted)], verify=verify)


def test_a_kind_that_is_none_is_refused() -> None:
    with pytest.raises(PassError, match="typo: expected a kind of exact, lossy, trained, found 'Exact'"):
        type("Typo", (Pass,), {"kind": "Exact"})


def test_a_pass_has_to_return_a_report() -> None:
    silent = type("Silent", (Pass,), {"run": lambda self, graph: None})
    with pytest.raises(PassError, match="expected silent to return a Report, found None"):
        apply_passes(captured("llama"), [silent()])
