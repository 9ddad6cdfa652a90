"""`--device`: every command that computes does so there; a device that is not there is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated import DEVICE
from tiny_checkpoint import TEXT, save_byte_checkpoint

from rolora_passes.errors import DeviceError
from rolora_passes.graphs import devices
from rolora_passes.graphs.devices import Place, find_device

Run = Callable[..., tuple[int, str, str]]
DATA = ("--samples", 8, "--length", 32)
QUICK = ("--set", "steps=2", "--set", "batch=2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", 1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def measured(rolora: Run, output: Path, *arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command writes on the CPU and on the device."""
    found = []
    for device in ("cpu", DEVICE):
        status, _, said = rolora(*arguments, "--device", device, "-o", output)
        assert status == 0, said
        found.append(json.loads(output.read_text()))
    return found[0], found[1]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Where tensors were fetched to."""
    seen: list[torch.device] = []
    fetch = Place.fetch

    def spy(self: Place, tensor: torch.Tensor) -> torch.Tensor:
        seen.append(self.device)
        return fetch(self, tensor)

    monkeypatch.setattr(Place, "fetch", spy)
    return seen


def test_eval(checkpoint: Path, text: Path, tmp_path: Path, rolora: Run, fetched: list[Any]) -> None:
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text(json.dumps({"question": "Up?", "choices": ["no", "down"], "answer": 1}))
    measures = ("--text", text, "--window", 32, "--windows", 2, "--tasks", quiz, "--calibration", text, *DATA)
    asked = ("eval", checkpoint, "--recipe", "rotated-gptq-8da4w", *measures)
    here, there = measured(rolora, tmp_path / "found.json", *asked)
    assert DEVICE in fetched
    assert there["perplexity"][0]["value"] == pytest.approx(here["perplexity"][0]["value"], rel=1e-3)
    assert there["tasks"]["tasks"] == here["tasks"]["tasks"]


@pytest.mark.parametrize("what", ["errors", "bisect", "ablate", "sensitivity"])
def test_diagnose(what: str, checkpoint: Path, text: Path, tmp_path: Path, rolora: Run) -> None:
    asked = ("diagnose", what, checkpoint, "--recipe", "rotated-8da4w", "--text", text, "--window", 32)
    here, there = measured(rolora, tmp_path / "found.json", *asked)
    if what == "errors":
        assert there["kl"] == pytest.approx(here["kl"], rel=1e-2)
    if what == "sensitivity":
        assert [site["name"] for site in there["sites"]] == [site["name"] for site in here["sites"]]


def test_inspect(checkpoint: Path, text: Path, tmp_path: Path, rolora: Run) -> None:
    asked = ("inspect", checkpoint, "--recipe", "rotated-8da4w", "--device", DEVICE)
    assert rolora(*asked)[1] == rolora(*asked[:-2])[1]
    view = ("--text", text, "--window", 32, "--view", tmp_path / "graph.json")
    for more in (view, ("--text", text, "--window", 32, "--html", tmp_path / "report.html")):
        status, _, said = rolora(*asked, *more)
        assert status == 0, said


def test_learn_and_tune(
    checkpoint: Path, text: Path, tmp_path: Path, rolora: Run, fetched: list[Any]
) -> None:
    data = ("--calibration", text, *DATA, *QUICK, "--work", tmp_path / "work", "--device", DEVICE)
    for command, recipe in (("learn", "spinquant:W4A4KV4"), ("tune", "rolora:W4A4")):
        out = tmp_path / command
        status, _, said = rolora(command, checkpoint, "--recipe", recipe, *data, "-o", out)
        assert status == 0, said
        assert json.loads((out / "learning.json").read_text())["last"] > 0
        assert DEVICE in fetched
        fetched.clear()


@pytest.mark.parametrize("target", ["executorch", "onnx"])
def test_programs_are_lowered_from_the_cpu(
    target: str, checkpoint: Path, text: Path, tmp_path: Path, rolora: Run
) -> None:
    made = []
    for device in ("cpu", DEVICE):
        out = tmp_path / str(device).replace(":", "")
        asked = ("--recipe", "rotated-8da4w", "--target", target, "--max-length", 64, "--device", device)
        status, _, said = rolora("compile", checkpoint, *asked, "--accept-loss", "-o", out)
        assert status == 0, said
        made.append(sorted((p.name, p.stat().st_size) for p in out.glob("model*")))
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda", r"expected a device that torch has here \(cpu, simulated:0\), found cuda: .*built"),
        ("simulated:1", r"expected a device that torch has here \(cpu, simulated:0\), found simulated:1"),
        ("gpu", r"expected a device \(cpu, simulated:0, auto\), found 'gpu'"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_name(name: str, said: str, rolora: Run) -> None:
    with pytest.raises(DeviceError, match=said):
        find_device(name)
    for command in ("compile", "eval", "learn", "tune", "inspect"):
        more = {"learn": ("--recipe", "spinquant:W4A4KV4")}.get(command, ())
        out = () if command in ("eval", "inspect") else ("-o", "nowhere")
        status, _, printed = rolora(command, "none", *more, *out, "--device", name)
        assert status == 2 and "DeviceError: expected a device" in printed and not Path("nowhere").exists()


def test_auto_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("auto") == DEVICE and find_device("cpu:0") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert find_device("auto") == torch.device("cpu")


def test_each_process_of_torchrun_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_device(DEVICE.type).index == 3 and find_device(f"{DEVICE.type}:1").index == 1


def test_copies_stay_while_there_is_room() -> None:
    one, two = torch.ones(100), torch.ones(100)
    place = devices.Place(DEVICE, room=600)
    first = place.fetch(one)
    assert first.device == DEVICE and place.fetch(one) is first
    assert place.fetch(two) is not place.fetch(two)  # no room
    del one, first
    assert place.fetch(two) is place.fetch(two)  # what is read no more has made some
