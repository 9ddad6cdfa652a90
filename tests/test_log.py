"""A log holds what a bug report needs, and nobody's home."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from helpers import captured

from rolora_passes import apply_passes
from rolora_passes.errors import PassError
from rolora_passes.log import logging_to, without_home


def test_a_run_that_works(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.log"
    with logging_to(path, ["compile", "a model", "--log", "x"]):
        apply_passes(captured("llama"), ["fuse-norm", {"rotate": {"seed": 3}}])
    text = path.read_text()
    assert "rolora compile 'a model' --log x" in text and "torch 2." in text and "CPUs" in text
    assert re.search(r"rotate\(seed=3\): \d+ sites, 0 left, \d+\.\d\d s, peak \d+ MB, \d+ nodes before", text)
    assert "same function to" in text and re.search(r"done\n.* s, peak \d+ MB\n$", text)
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in text.splitlines())


def test_a_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(__file__).parent))
    path = tmp_path / "run.log"
    with pytest.raises(PassError), logging_to(path, [f"{Path.home()}/model"]):
        raise PassError("cannot")
    text = path.read_text()
    assert "Traceback" in text and "PassError: cannot" in text and "failed" in text
    assert 'File "~/test_log.py"' in text and "rolora ~/model\n" in text
    assert str(Path.home()) not in text


def test_nothing_is_logged_without_a_file_or_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(None, []):
        apply_passes(captured("llama"), ["fuse-norm"])
    with logging_to(tmp_path / "log", []):
        pass
    size = (tmp_path / "log").stat().st_size
    apply_passes(captured("llama"), ["fuse-norm"])
    assert (tmp_path / "log").stat().st_size == size and capsys.readouterr().err == ""
    assert not any(isinstance(h, logging.FileHandler) for h in logging.getLogger("rolora_passes").handlers)


def test_home_is_left_alone_where_it_is_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert without_home("/elsewhere/x") == "/elsewhere/x"
