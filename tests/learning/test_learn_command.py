"""`rolora learn` from a model folder to rotations, a recipe that holds them, and an account."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import TEXT, save_checkpoint

from rolora_passes import apply_passes
from rolora_passes.graphs.bases.rotations import load_rotations
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.info import info
from rolora_passes.graphs.running import run
from rolora_passes.loading.models import load_model
from rolora_passes.recipes import load_recipe

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def learn(rolora: Run, checkpoint: Path, tmp_path: Path) -> Run:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def command(recipe: str, *more: object) -> tuple[int, str, str]:
        data = ("--calibration", text, "--samples", 8, "--length", 32)
        return rolora("learn", checkpoint, "--recipe", recipe, "-o", tmp_path / "out", *data, *more)

    return command


@pytest.mark.parametrize(
    "recipe", ["spinquant:W4A4KV4", "learned-rtn:W4A8", "dartquant:W4A4", "learned-8da4w"]
)
def test_writes_what_it_learned(recipe: str, learn: Run, checkpoint: Path, tmp_path: Path) -> None:
    status, _, said = learn(recipe, "--set", "steps=3", "--set", "batch=4")
    assert status == 0, said
    assert "3 steps" in said and "recipe.yaml" in said
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "R.bin", "rotations.json", "recipe.yaml", "losses.csv", "losses.png", "learning.json"
    }  # fmt: skip
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.reader((out / "losses.csv").open()))
    assert rows[0] == ["step", "loss"] and len(rows) == 4
    about = json.loads((out / "learning.json").read_text())
    assert about["orthogonality_error"] < 1e-5 and about["last"] == float(rows[-1][1])
    learned = load_rotations(out / "R.bin")
    assert {"R1", "model.layers.0.self_attn.R2"} <= set(learned)
    moved = tmp_path / "elsewhere"
    shutil.move(out, moved)
    steps = [
        p for p in load_recipe(moved / "recipe.yaml") if not p.name.startswith(("quantize", "learn-scales"))
    ]
    assert "learn-rotation" not in [p.name for p in steps]
    graph = capture(load_model(str(checkpoint))[0])
    again = apply_passes(graph, steps)
    assert {e.method for e in info(again).rotations.values()} <= {"given", "hadamard"}
    for key, value in learned.items():
        torch.testing.assert_close(info(again).rotations[key].matrix.float(), value, rtol=1e-5, atol=1e-5)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(run(again, tokens), run(graph, tokens), rtol=1e-3, atol=1e-3)


def test_compile_after_learning_points_into_its_own_folder(
    learn: Run, rolora: Run, checkpoint: Path, tmp_path: Path
) -> None:
    assert learn("learned-8da4w", "--set", "steps=1", "--set", "batch=2")[0] == 0
    recipe, model = tmp_path / "out" / "recipe.yaml", tmp_path / "model"
    data = ("--calibration", tmp_path / "text.txt", "--samples", 8, "--length", 32)
    status, _, said = rolora(
        "compile", checkpoint, "--recipe", recipe, "-o", model, "--max-length", 32, *data
    )
    assert status == 0, said
    text = (model / "recipe.yaml").read_text()
    assert "given: rotations.json" in text and str(tmp_path) not in text
    assert load_recipe(model / "recipe.yaml")[1].given == model / "rotations.json"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("quarot:W4A4KV4", (), "a recipe with one learn-rotation, found 0"),
        ("spinquant:W4A4KV4", ("--set", "stepz=3"), "stepz"),
        ("spinquant:W4A4KV4", ("--set", "steps"), "NAME=VALUE, found"),
        ("spinquant:W4A4KV4", ("--set", "steps=0"), "steps must be 1 or more"),
    ],
)
def test_bad_calls(recipe: str, more: tuple[str, ...], message: str, learn: Run, tmp_path: Path) -> None:
    status, _, said = learn(recipe, *more)
    assert status == 2 and message in said
    assert not (tmp_path / "out").exists()


def test_leaves_other_folders_alone(learn: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    status, _, said = learn("spinquant:W4A4KV4")
    assert status == 2 and "holds something else" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_interruption_leaves_nothing(learn: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rolora_passes.learning.loop._Run.advance", stop)
    status, _, said = learn("spinquant:W4A4KV4")
    assert status == 130 and "nothing was written" in said
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]
