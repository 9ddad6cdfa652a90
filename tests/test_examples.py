"""Every example runs as its first lines say, on its tiny model, and shows what it claims."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def rotate_and_verify(printed: str) -> None:
    error = re.search(r"before and after: (\S+) relative", printed)
    assert error and float(error[1]) < 1e-12
    assert "residual: 64 channels, admits any orthogonal matrix" in printed


def quantize_and_compare(printed: str) -> None:
    found = {name: float(kl) for name, kl in re.findall(r"^(\S+) +(\S+) nats$", printed, flags=re.MULTILINE)}
    assert found["float"] < 1e-9
    assert 1e-4 < found["quarot-rtn:W4A4"] < found["rtn:W4A4"]


def lora_before_or_after(printed: str) -> None:
    *kept, mistaken = [float(line.split()[-1]) for line in printed.splitlines()[1:]]
    assert len(kept) == 4
    assert max(kept) < 1e-12
    assert mistaken > 0.1


def to_laptop(printed: str) -> None:
    assert re.search(r"^model\.onnx: \d\.\d\d MB, \d+ nodes$", printed, flags=re.MULTILINE)
    tokens = re.search(r"^tokens \[(.*)\]$", printed, flags=re.MULTILINE)
    assert tokens and len(tokens[1].split(",")) == 12
    error = re.search(r"^encoder: logits \[2, 9, 128\], (\S+) from the graph's$", printed, flags=re.MULTILINE)
    assert error and float(error[1]) < 1e-4


def to_phone(printed: str) -> None:
    assert re.search(r"^model\.pte: \d\.\d\d MB, \d+ delegates$", printed, flags=re.MULTILINE)
    tokens = re.search(r"^tokens \[(.*)\]$", printed, flags=re.MULTILINE)
    assert tokens and all(0 <= int(token) < 128 for token in tokens[1].split(","))
    assert len(tokens[1].split(",")) == 12


def packaged_model(printed: str) -> None:
    assert Path(printed.strip()).is_file()


CHECKS: list[Callable[[str], None]] = [
    rotate_and_verify,
    quantize_and_compare,
    lora_before_or_after,
    to_phone,
    to_laptop,
    packaged_model,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_example(check: Callable[[str], None], tmp_path: Path) -> None:
    script = ROOT / "examples" / f"{check.__name__}.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    check(done.stdout)
    assert not list(tmp_path.iterdir())


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {check.__name__ for check in CHECKS}


def outliers(printed: str) -> None:
    found = re.search(r"kurtosis (\S+) before, (\S+) after", printed)
    assert found and float(found[1]) > 20 and float(found[2]) < 6
    losses = [float(kl) for kl in re.findall(r"W4A4 +(\S+) nats", printed)]
    assert 0 < losses[1] < losses[0]


def first_pass(printed: str) -> None:
    assert "drop-neutral changed ['mul_1', 'mul_2']" in printed
    assert "drop-too-much" in printed


NOTEBOOKS: list[Callable[[str], None]] = [outliers, first_pass]


@pytest.mark.parametrize("check", NOTEBOOKS, ids=lambda check: check.__name__)
def test_notebook(check: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples" / f"{check.__name__}.ipynb", as_version=4)
    stripped = all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells)
    assert stripped, "outputs are not kept: they change with every run"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    check("".join(output.get("text", "") for output in outputs))


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.ipynb")} == {c.__name__ for c in NOTEBOOKS}
