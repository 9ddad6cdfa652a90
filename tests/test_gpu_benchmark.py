"""benchmarks/gpu.py measures what there is, and says so where there is nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from simulated import DEVICE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu


def test_measures_every_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(gpu, "SIZES", tiny)
    monkeypatch.setattr(gpu, "VOCABULARY", 97)
    monkeypatch.setattr(gpu, "LENGTH", 16)
    monkeypatch.setattr(gpu, "ROWS", 4)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", str(DEVICE), "--layers", "1"])
    gpu.main()
    said = capsys.readouterr().out
    assert said.count("GB/s") == 2 and said.count("not installed") == 2
    for step in ("capture", "forward", "fold", "learned", "GPTQ"):
        (line,) = (line for line in said.splitlines() if step in line)
        assert "x " in line


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_says_that_there_is_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", name])
    gpu.main()
    assert capsys.readouterr().out.startswith("nothing to measure: ")
