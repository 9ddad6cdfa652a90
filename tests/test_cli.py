"""`rolora eval` from a model folder to a table and a JSON file, and what `rolora compile` passes on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_checkpoint import TEXT, save_checkpoint

from rolora_passes.evaluation import GraphScorer, Perplexity, open_scorer, perplexity
from rolora_passes.graphs import save_graph
from rolora_passes.loading.data import calibration_tokens, token_stream
from rolora_passes.passes import catalogue
from rolora_passes.passes.base import Calibration, Pass, Report

QUESTIONS = [
    {"question": "What is red?", "choices": ["a rose", "grass"], "answer": 0},
    {"question": "Two and one", "choices": ["4", "3"], "answer": 1},
    {"question": "Up?", "choices": ["no", "down", "left"], "answer": 1},
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some text.txt"
    path.write_text(TEXT)
    return path


def test_eval(checkpoint: Path, text: Path, tmp_path: Path, rolora: Run) -> None:
    quiz, output = tmp_path / "quiz.jsonl", tmp_path / "results" / "tiny.json"
    quiz.write_text("\n".join(map(json.dumps, QUESTIONS)))
    status, printed, said = rolora(
        *("eval", checkpoint, "--recipe", "8da4w", "--text", text, "--window", 64, "--windows", 3),
        *("--tasks", quiz, "--task-limit", 2, "--seed", 5, "-o", output),
    )
    assert status == 0, said
    result = json.loads(output.read_text())
    scorer, tokenizer = open_scorer(checkpoint, recipe="8da4w")
    expected = perplexity(scorer, token_stream([TEXT], tokenizer), 64, 3)
    (found,) = result["perplexity"]
    assert found["value"] == pytest.approx(expected.value) and found["error"] == pytest.approx(expected.error)
    assert (found["text"], found["windows"], found["tokens"]) == ("some text.txt", 3, 189)
    assert result["perplexity_protocol"].startswith("token-level perplexity")
    assert result["tasks"]["tasks"]["quiz"]["examples"] == 2
    assert result["tasks"]["seed"] == result["seed"] == 5
    assert (result["source"], result["kind"], result["recipe"]) == ("tiny", "graph", "8da4w")
    assert "quantize-weights" in {record["name"] for record in result["passes"]}
    assert {"torch", "transformers", "lm-eval", "rolora-passes", "python"} <= set(result["versions"])
    assert str(tmp_path) not in output.read_text(), "names of folders are nobody's business"
    assert re.search(rf"perplexity, some text.txt +│ +{expected.value:.3f} │ .* 3 windows of 64, \d", printed)
    assert re.search(r"acc_norm, quiz +│ +\d\.\d{4} │ +\d.* 2 of 3, 0-shot", printed)
    assert "Perplexity is token level." in printed
    assert "quantize-weights" in said


def test_eval_of_a_compiled_folder_and_of_a_saved_graph(
    checkpoint: Path, text: Path, tmp_path: Path, rolora: Run
) -> None:
    folder, graph = tmp_path / "compiled", tmp_path / "graph.safetensors"
    assert rolora("compile", checkpoint, "-o", folder, "--recipe", "float", "--max-length", 32)[0] == 0
    scorer = open_scorer(checkpoint)[0]
    assert isinstance(scorer, GraphScorer)
    save_graph(scorer.graph, graph)
    values = []
    for arguments in ((checkpoint,), (folder,), (graph, "--tokenizer", checkpoint)):
        status, _, said = rolora(
            "eval", *arguments, "--text", text, "--window", 32, "-o", tmp_path / "out.json"
        )
        assert status == 0, said
        values.append(json.loads((tmp_path / "out.json").read_text())["perplexity"][0]["value"])
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-5)


class Looks(Pass):
    """Keeps what it was given."""

    given: list[Calibration] = []

    @property
    def needs_calibration(self) -> bool:
        return True

    def calibrate(self, graph: torch.fx.GraphModule, calibration: Calibration) -> Report:
        self.given.append(calibration)
        calibration.on_progress(self.name, 1, 2)
        return Report()


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose pass looks at data."""
    monkeypatch.setattr(catalogue, "Looks", Looks, raising=False)
    monkeypatch.setattr(Looks, "given", [])
    path = tmp_path / "looks.yaml"
    path.write_text("passes: [looks]")
    return path


@pytest.mark.parametrize("command", ["eval", "compile"])
def test_calibration(
    command: str, checkpoint: Path, text: Path, looks: Path, tmp_path: Path, rolora: Run
) -> None:
    own = ("--text", text, "--window", 64) if command == "eval" else ("--max-length", 16)
    given = ("--calibration", text, "--samples", 5, "--length", 30, "--seed", 3, "--work", tmp_path / "work")
    status, _, said = rolora(command, checkpoint, "--recipe", looks, "-o", tmp_path / "out", *own, *given)
    assert status == 0, said
    (calibration,) = Looks.given
    expected = calibration_tokens(text, open_scorer(checkpoint)[1], 5, 30, 3)
    assert torch.equal(calibration.tokens, expected) and calibration.work == tmp_path / "work"
    if command == "eval":
        used = json.loads((tmp_path / "out").read_text())["calibration"]
        assert used == {"text": "some text.txt", "samples": 5, "length": 30, "seed": 3}
    status, _, said = rolora(command, checkpoint, "--recipe", looks, "-o", tmp_path / "other", *own)
    assert status == 2
    assert re.search("error: PassError: looks looks at data and was given none: .*--calibration FILE", said)


def test_calibration_that_nobody_asked_for(checkpoint: Path, text: Path, rolora: Run) -> None:
    status, _, said = rolora("eval", checkpoint, "--text", text, "--window", 64, "--calibration", text)
    assert status == 0 and "no pass of the recipe looks at data: --calibration was not used" in said


BAD: dict[str, tuple[list[object], str]] = {
    "nothing": ([], "EvaluationError: expected something to measure, found neither --text nor --tasks"),
    "no text": (["--text", "none.txt"], "DataError: expected a text file at none.txt, found nothing"),
    "short": (["--text", "TEXT"], "EvaluationError: expected windows of at most 256 tokens, .* --window 256"),
    "shorter": (
        ["--text", "SHORT", "--window", 64],
        r"DataError: .*short.txt: expected .* 64 tokens, found 5:",
    ),
    "task": (["--tasks", "none.jsonl"], "EvaluationError: expected a task file at none.jsonl, found nothing"),
    "window": (["--text", "TEXT", "--window", 1], "--window: expected 2 or more, found 1"),
    "windows": (["--text", "TEXT", "--windows", 0], "--windows: expected 1 or more, found 0"),
    "dtype": (["--text", "TEXT", "--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
    "output": (
        ["--text", "TEXT", "-o", "FOLDER"],
        "IsADirectoryError: expected a file to write, found a folder",
    ),
    "recipe": (["--text", "TEXT", "--recipe", "none"], "PassError: expected a recipe file .* found 'none'"),
    "calibration": (
        ["--text", "TEXT", "--calibration", "none.txt"],
        "DataError: expected a text file at none",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(
    arguments: list[object], message: str, checkpoint: Path, text: Path, tmp_path: Path, rolora: Run
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("short")
    places = {"TEXT": text, "SHORT": short, "FOLDER": tmp_path}
    before = sorted(tmp_path.iterdir())
    status, printed, said = rolora("eval", checkpoint, *[places.get(str(a), a) for a in arguments])
    assert status == 2 and not printed
    assert re.search(rf"error: .*{message}", said), said
    assert sorted(tmp_path.iterdir()) == before


def test_a_text_too_short_is_found_before_any_pass(checkpoint: Path, tmp_path: Path, rolora: Run) -> None:
    (tmp_path / "short.txt").write_text("short")
    status, _, said = rolora("eval", checkpoint, "--text", tmp_path / "short.txt", "--recipe", "8da4w")
    assert status == 2 and "sites" not in said


def test_figures_beyond_numbers_are_written_as_none(
    checkpoint: Path, text: Path, rolora: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = Perplexity(math.inf, 800.0, 1.0, 63, 2, 64, 0.1)
    monkeypatch.setattr("rolora_passes.evaluation.report.perplexity", lambda *_: found)
    status, printed, said = rolora(
        "eval", checkpoint, "--text", text, "--window", 64, "-o", tmp_path / "a.json"
    )
    assert status == 0, said
    (row,) = json.loads((tmp_path / "a.json").read_text())["perplexity"]
    assert (row["value"], row["error"], row["nll"]) == (None, None, 800)
    assert re.search(r"some text.txt +│ +too large │ +│ 2 windows", printed)


def test_what_was_measured_is_shown_even_if_it_cannot_be_written(
    checkpoint: Path, text: Path, rolora: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rolora_passes.evaluation.report.json", SimpleNamespace(dumps=fail))
    status, printed, said = rolora(
        "eval", checkpoint, "--text", text, "--window", 64, "-o", tmp_path / "a.json"
    )
    assert status == 2 and "perplexity, some text.txt" in printed and "No space left" in said
    assert not (tmp_path / "a.json").exists()


def test_sensitivity(checkpoint: Path, text: Path, tmp_path: Path, rolora: Run) -> None:
    output = tmp_path / "sites.json"
    status, printed, said = rolora(
        *("sensitivity", checkpoint, "--recipe", "quarot:W3A4", "--text", text, "--window", 32),
        *("--windows", 2, "--top", 3, "-o", output),
    )
    assert status == 0, said
    result = json.loads(output.read_text())
    assert len(result["sites"]) == 7 and printed.count("model.layers.0") == 3
    assert [list(q) for q in result["quantizers"]] == [["quantize-weights"], ["quantize-activations"]]
    values = [site["kl"] for site in result["sites"]]
    assert values == sorted(values, reverse=True) and values[-1] > 0
    assert result["sites"][0]["name"] in printed


def test_sensitivity_of_a_recipe_that_quantizes_nothing(checkpoint: Path, text: Path, rolora: Run) -> None:
    status, _, said = rolora("sensitivity", checkpoint, "--recipe", "float", "--text", text)
    assert status == 2 and "expected a recipe with quantize-weights or quantize-activations, found" in said


def test_passes_shows_a_recipe(rolora: Run) -> None:
    status, printed, _ = rolora("passes", "quarot:W4A4KV4")
    assert status == 0 and "method: gptq" in printed and "quantize-kv-cache" in printed
    assert "rotate" in rolora("passes", "rotated-8da4w")[1]
    options = rolora("passes", "rilq")[1]
    for name in ("under", "weight_decay", "patience"):  # inherited ones too
        assert re.search(rf"^{name} +\w", options, re.MULTILINE), options
    assert "quarot:W4A4KV4" in rolora("passes")[1]
