"""`rolora track`, `bisect` and `ablate` from a model folder to tables and JSON; logs, prints, reproducers."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from test_reproducer import Breaks
from tiny_checkpoint import TEXT, save_checkpoint

from rolora_passes.evaluation import GraphScorer, open_scorer
from rolora_passes.graphs import save_graph
from rolora_passes.graphs.graph import get_tensor, set_tensor
from rolora_passes.passes import catalogue

Run = Callable[..., tuple[int, str, str]]
WINDOW = ("--window", 32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some text.txt"
    path.write_text(TEXT)
    return path


def test_track(checkpoint: Path, text: Path, tmp_path: Path, rolora: Run) -> None:
    output, log = tmp_path / "trace.json", tmp_path / "run.log"
    status, printed, said = rolora(
        *("track", checkpoint, "--recipe", "rotated-8da4w", "--text", text, *WINDOW, "--windows", 2),
        *("--top", 4, "--below", 20, "-o", output, "--log", log),
    )
    assert status == 0, said
    result = json.loads(output.read_text())
    assert (result["source"], result["recipe"], result["tokens"]) == ("tiny", "rotated-8da4w", [2, 32])
    assert len(result["nodes"]) == 12 and result["nodes"][-1]["kind"] == "logits"
    assert f"KL {result['kl']:.4f} nats per token" in printed and "The 4 lowest SQNRs of 12 values" in printed
    assert "below 20 dB" in printed and "quantize-weights" in said
    logged = log.read_text()
    assert "rolora track" in logged and "fold-constants()" in logged and "tracking" in logged
    assert str(tmp_path) not in output.read_text()


def test_bisect_a_recipe(checkpoint: Path, text: Path, tmp_path: Path, rolora: Run) -> None:
    output = tmp_path / "found.json"
    status, printed, said = rolora(
        *("bisect", checkpoint, "--recipe", "rotated-8da4w", "--text", text, *WINDOW, "--most", 2),
        *("-o", output),
    )
    assert status == 0, said
    result = json.loads(output.read_text())
    assert result["passes"][0]["name"] == "fuse-norm"
    assert not any(loss["fault"] for loss in result["passes"])
    assert 1 <= len(result["sites"]["faults"]) <= 2 and result["sites"]["kl"] > 1e-4
    assert (
        "the divergence grows most by quantize-" in printed
        and result["sites"]["faults"][0]["site"] in printed
    )


def test_bisect_two_graphs(checkpoint: Path, text: Path, tmp_path: Path, rolora: Run) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    scorer = open_scorer(checkpoint, recipe="8da4w")[0]
    assert isinstance(scorer, GraphScorer)
    save_graph(scorer.graph, good)
    scale = "model.layers.0.mlp.down_proj.weight_scale"
    wrong = get_tensor(scorer.graph, scale).clone()
    wrong[5, 1] *= 16
    set_tensor(scorer.graph, scale, wrong)
    save_graph(scorer.graph, bad)
    arguments = ("bisect", bad, "--good", good, "--tokenizer", checkpoint, "--text", text, *WINDOW)
    status, printed, said = rolora(*arguments)
    assert status == 0, said
    assert "model.layers.0.mlp.down_proj" in printed
    assert "group 1 of row 5: scale is 16x the good graph's" in re.sub(r"[\s│]+", " ", printed)
    status, _, said = rolora(*arguments, "--recipe", "8da4w")
    assert status == 2 and "expected either --recipe, or --good" in said


@pytest.mark.parametrize("leave", ["quantizers", "hadamards"])
def test_ablate(checkpoint: Path, text: Path, tmp_path: Path, rolora: Run, leave: str) -> None:
    output = tmp_path / "changes.json"
    status, printed, said = rolora(
        *("ablate", checkpoint, "--recipe", "rotated-8da4w", "--text", text, *WINDOW, "--leave", leave),
        *("-o", output),
    )
    assert status == 0, said
    result = json.loads(output.read_text())
    assert len(result["changes"]) == (9 if leave == "quantizers" else 1) and result["left"] == leave
    assert result["changes"][0]["site"] in printed


def test_a_compiled_folder_is_refused(text: Path, tmp_path: Path, rolora: Run) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    status, _, said = rolora("track", tmp_path, "--recipe", "8da4w", "--text", text)
    assert status == 2 and "found a compiled folder" in said, "it has no values to look at"


def test_graphs_are_printed(checkpoint: Path, text: Path, tmp_path: Path, rolora: Run) -> None:
    status, _, said = rolora(
        *("eval", checkpoint, "--recipe", "8da4w", "--text", text, *WINDOW),
        *("--print-graph", "changed", "--print-to", tmp_path / "graphs"),
    )
    assert status == 0, said
    assert (tmp_path / "graphs" / "00-quantize-weights.txt").read_text().startswith("--- before")


@pytest.mark.parametrize("command", ["compile", "eval"])
def test_a_failing_pass_leaves_its_graph_a_reproducer_and_a_log(
    command: str, checkpoint: Path, text: Path, tmp_path: Path, rolora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "Breaks", Breaks, raising=False)
    recipe, bug = tmp_path / "recipe.yaml", tmp_path / "bug"
    recipe.write_text("passes: [fuse-norm, breaks: {name_part: layers.0.mlp}]")
    own = ("-o", tmp_path / "out", "--max-length", 32) if command == "compile" else ("--text", text, *WINDOW)
    with pytest.raises(ValueError, match="cannot work with"):
        rolora(command, checkpoint, "--recipe", recipe, *own, "--print-to", bug, "--log", bug / "log.txt")
    assert (bug / "01-breaks-failed.txt").read_text().startswith("model.embed_tokens.weight: ")
    with pytest.raises(ValueError, match="cannot work with"):
        runpy.run_path(str(bug / "reproducer" / "reproduce.py"))
    logged = (bug / "log.txt").read_text()
    assert "failed unexpectedly" in logged and "ValueError: cannot work with layers.0.mlp" in logged
    assert not (tmp_path / "out").exists()
