"""What tests of the command line share; and tiny models compute slower on several threads than on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rolora_passes.cli import main

torch.set_num_threads(1)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rolora(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process: its status, what it printed, what it said on standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return (status, *capsys.readouterr())

    return command
