"""`rolora tune` from a model folder to an adapter that PEFT loads, and a recipe that compiles with it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from tiny_checkpoint import TEXT, save_checkpoint
from transformers import AutoModelForCausalLM

from rolora_passes import apply_passes
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error
from rolora_passes.loading.models import load_model
from rolora_passes.recipes import load_recipe

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--set", "batch=4", "--set", "lr=0.01", "--set", "evaluate_every=2")
ROUNDED = """
passes:
- fuse-norm
- rotate
- fold-constants
- quantize-weights: {bits: 2, group_size: 16, method: gptq, head: null}
- add-lora: {rank: 4}
- rilq: {steps: 3, batch: 4, evaluate_every: 2}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def tune(rolora: Run, checkpoint: Path, tmp_path: Path) -> Run:
    data, text = tmp_path / "instructions.jsonl", tmp_path / "text.txt"
    rows = [{"instruction": f"say {n}", "output": f"{n}, and {n} again"} for n in range(60)]
    data.write_text("\n".join(map(json.dumps, rows)))
    text.write_text(TEXT)

    def command(*more: object) -> tuple[int, str, str]:
        return rolora(
            "tune", checkpoint, "-o", tmp_path / "out", "--data", data, "--window", 128, *QUICK, *more
        )

    return command


def test_instructions_that_are_missing_are_found_before_the_model_is_loaded(
    checkpoint: Path, tmp_path: Path, rolora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rolora_passes.recipes.opening.load_outlined", None)
    status, _, said = rolora("tune", checkpoint, "-o", tmp_path / "out", "--data", tmp_path / "none.jsonl")
    assert status == 2 and re.search(r"error: DataError: expected .*none\.jsonl", said), said


def test_too_few_instructions_are_refused_before_the_model_is_loaded(
    tune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rolora_passes.recipes.opening.load_outlined", None)
    status, _, said = tune("--set", "validation=0.99")
    assert status == 2 and re.search("error: PassError: tune-lora: expected windows to learn from", said), (
        said
    )


def test_an_adapter_that_peft_loads(tune: Run, checkpoint: Path, tmp_path: Path) -> None:
    status, _, said = tune("--recipe", "rolora-rtn:W4A4", "--epochs", 1)
    assert status == 0, said
    assert "2 branches" in said and "held out" in said and "recipe.yaml" in said
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "adapter", "recipe.yaml", "losses.csv", "losses.png", "learning.json"
    }  # fmt: skip
    rows = list(csv.reader((out / "losses.csv").open()))
    assert rows[0] == ["step", "loss", "held out"] and rows[2][2]
    about = json.loads((out / "learning.json").read_text())
    assert about["best"] in dict(about["validation"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tuned = peft.PeftModel.from_pretrained(model, str(out / "adapter")).eval()
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        expected = tuned(tokens).logits
    shutil.move(out, tmp_path / "elsewhere")
    steps = [p for p in load_recipe(tmp_path / "elsewhere" / "recipe.yaml") if "quantize" not in p.name]
    assert "tune-lora" not in [p.name for p in steps]
    graph = capture(load_model(str(checkpoint))[0])
    found = run(apply_passes(graph, steps), tokens)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(run(graph, tokens), expected) > 1e-3


def test_an_adapter_for_rounded_weights(tune: Run, rolora: Run, checkpoint: Path, tmp_path: Path) -> None:
    """RILQ on text, after GPTQ; the compiled folder has the adapter with it."""
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    recipe.write_text(ROUNDED)
    data = ("--calibration", text, "--samples", 8, "--length", 32)
    status, _, said = rolora("tune", checkpoint, "-o", tmp_path / "out", "--recipe", recipe, *data)
    assert status == 0, said
    assert "7 branches" in said and "--calibration TEXT" in said
    status, found, said = rolora(
        "eval",
        checkpoint,
        "--recipe",
        tmp_path / "out" / "recipe.yaml",
        "--text",
        text,
        "--window",
        32,
        *data,
    )
    assert status == 0 and "perplexity" in found, said


def test_compile_takes_the_adapter_along(tune: Run, rolora: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "kept.yaml"
    recipe.write_text(
        "passes:\n- fuse-norm\n- rotate\n- fold-constants\n"
        "- quantize-weights: {bits: 4, group_size: 32, head: 4}\n- fold-constants\n"
        "- add-lora: {rank: 4}\n- tune-lora: {steps: 2, batch: 4}\n"
        "- quantize-activations\n- quantize-embedding\n- fold-constants\n"
    )
    assert tune("--recipe", recipe)[0] == 0
    status, _, said = rolora(
        "compile", checkpoint, "--recipe", tmp_path / "out" / "recipe.yaml", "-o", tmp_path / "model",
        "--max-length", 32, "--target", "executorch", "--target", "onnx",
        "--adapter", f"twice={tmp_path / 'out' / 'adapter'}",
    )  # fmt: skip
    assert status == 0, said
    text = (tmp_path / "model" / "recipe.yaml").read_text()
    assert "adapter: adapter" in text and str(tmp_path) not in text
    for name in ("adapter", "adapters/twice"):
        assert (tmp_path / "model" / name / "adapter_config.json").is_file()
    call = torch.tensor([[3, 1, 4]]), torch.tensor([0])
    once, twice = (load_pte(tmp_path / "model" / "model.pte", name)(*call) for name in ("forward", "twice"))
    assert 0 < (once - twice).abs().max() < 1
    table = json.loads((tmp_path / "model" / "manifest.json").read_text())["parity"]
    assert {"executorch", "onnx"} <= {row["name"] for row in table}
    assert all(row["kl_graph"] < 0.05 for row in table)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--adapter", "fr=none"), r"expected an adapter in none, found no adapter_config.json"),
        (("--adapter", "two words=none"), "expected names of methods that are identifiers"),
        (("--adapter", "a=x", "--adapter", "a=y"), "expected adapters of different names, found a, a"),
        (("--adapter", "a"), "expected NAME=VALUE, found 'a'"),
        (("--adapter", "a=x", "--target", "onnx"), "expected target executorch, whose methods adapters are"),
    ],
)
def test_bad_adapters(more: tuple[str, ...], message: str, rolora: Run, tmp_path: Path) -> None:
    """Found out before the model is looked for."""
    status, _, said = rolora("compile", "./no-such-model", "-o", tmp_path / "out", *more)
    assert status == 2 and message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recipe", "quarot:W4A4"), "a recipe with one tune-lora, found 0"),
        (("--recipe", "rolora:W4A4", "--set", "stepz=3"), "stepz"),
        (("--recipe", "rolora:W4A4", "--window", 40000), "expected 40000 tokens or more"),
    ],
)
def test_bad_calls(more: tuple[object, ...], message: str, tune: Run, tmp_path: Path) -> None:
    status, _, said = tune(*more)
    assert status == 2 and message in said
    assert not (tmp_path / "out").exists()


def test_nothing_to_train_on(rolora: Run, checkpoint: Path, tmp_path: Path) -> None:
    status, _, said = rolora("tune", checkpoint, "-o", tmp_path / "out")
    assert status == 2 and "give --data INSTRUCTIONS.jsonl, or --calibration TEXT" in said
