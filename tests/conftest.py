"""How tests share what costs most, and what those of the command line have in common."""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, OTHERS
from packages import ACME, THIRD_PARTY, Groups, write_metadata
from transformers import PreTrainedModel

from rolora_passes.cli import main
from rolora_passes.graphs.operators import operators

torch.set_num_threads(1)  # tiny models compute slower on several
Run = Callable[..., tuple[int, str, str]]
Install = Callable[..., None]
_TRACED: dict[str, tuple[PreTrainedModel, Any]] = {}


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process has all tests of an architecture, which it captures once, and those of a file.

    Tests that lower take longest and share little: they stay single, and fill what time is left at the end.
    """
    known = CONFIGS.keys() | OTHERS.keys()
    for item in items:
        spec = getattr(item, "callspec", None)
        given = [value for value in spec.params.values() if isinstance(value, str)] if spec else []
        names = [value for value in given if value in known]
        if names or item.path.parent.name != "export":
            item.add_marker(pytest.mark.xdist_group(names[0] if names else item.path.stem))


def pytest_collection_finish() -> None:
    """Python's collector leaves alone what was imported, half a million objects, which it would walk over and
    over; and it walks the graphs that tests share less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _identity(model: PreTrainedModel) -> str:
    """The same for models that nothing tells apart."""
    found = hashlib.sha256(f"{type(model)} {model.config.to_json_string()}".encode())
    for name, value in model.state_dict().items():
        found.update(f"{name} {value.dtype} {value.device} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module", autouse=True)
def traced_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Equal models are traced once, but for tests of capture: most of what a command does to a tiny model."""
    capturing = sys.modules["rolora_passes.graphs.capture"]  # its package has a function of this name
    trace = capturing._export

    def remembered(model: PreTrainedModel, kind: Any) -> Any:
        key = _identity(model)
        # A trace shares its model's weights, which a test may have changed since.
        if key not in _TRACED or _identity(_TRACED[key][0]) != key:
            _TRACED[key] = model, trace(model, kind)
        return _TRACED[key][1]

    with pytest.MonkeyPatch.context() as patch:
        if "test_capture" not in request.module.__name__:
            patch.setattr(capturing, "_export", remembered)
        yield


@pytest.fixture
def rolora(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process: its status, what it printed, what it said on standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return (status, *capfd.readouterr())

    return command


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages: `acme` of the folder `third_party`, or others, by name, entry points and modules."""
    written: set[str] = set()

    def installed(name: str = "acme", groups: Groups = ACME["entry-points"], **modules: str) -> None:
        folder = tmp_path / f"site-{name}"  # of its own: what a path was found to hold is remembered
        folder.mkdir()
        write_metadata(folder, name, ACME["version"], groups)
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)
            written.add(module)
        for place in (THIRD_PARTY, folder):
            monkeypatch.syspath_prepend(place)
        operators.cache_clear()

    yield installed
    operators.cache_clear()
    for module in written:
        sys.modules.pop(module, None)
