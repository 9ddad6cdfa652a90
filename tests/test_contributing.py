"""The code in CONTRIBUTING.md works as the page says: the pass, its registration, its test, the checks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import blocks

from rolora_passes import passes
from rolora_passes.export import targets
from rolora_passes.export.target import make_target
from rolora_passes.graphs.operators import registry
from rolora_passes.passes import catalogue
from rolora_passes.passes.registry import make_pass

ROOT = Path(__file__).parent.parent


@pytest.fixture
def page(tmp_path: Path) -> dict[str, Path]:
    """The page's blocks of Python, in files named as the page names them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    names = (
        "sort_channels.py",
        "catalogue.py",
        "test_sort_channels.py",
        "asinh.py",
        "test_asinh.py",
        "target.py",
    )
    assert len(blocks) == len(names)
    for name, block in zip(names, blocks, strict=True):
        (tmp_path / name).write_text(block)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return {name: tmp_path / name for name in names}


@pytest.fixture
def sort_channels(page: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's pass, in the catalogue."""
    folder = page["sort_channels.py"].parent
    monkeypatch.setattr(passes, "__path__", [*passes.__path__, str(folder)])
    line: dict[str, Any] = {}
    exec(page["catalogue.py"].read_text(), line)
    monkeypatch.setattr(catalogue, "SortChannels", line["SortChannels"], raising=False)
    yield line["SortChannels"]
    for name in ("rolora_passes.passes.sort_channels", "test_sort_channels", "test_asinh"):
        sys.modules.pop(name, None)


def passed(test: Path) -> bool:
    return pytest.main([str(test), "--rootdir", str(test.parent), "-p", "no:cacheprovider", "-q"]) == 0


def test_the_pass_and_its_test_run(page: dict[str, Path], sort_channels: Any) -> None:
    assert make_pass("sort-channels") == sort_channels()
    assert passed(page["test_sort_channels.py"])


@pytest.mark.usefixtures("sort_channels")
def test_the_record_and_its_test_run(page: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(page["asinh.py"].read_text(), names)
    monkeypatch.setattr(registry, "OURS", (*registry.OURS, names["ASINH"]))
    registry.operators.cache_clear()
    try:
        assert passed(page["test_asinh.py"])
    finally:
        monkeypatch.undo()
        registry.operators.cache_clear()


def test_the_target_is_one_file(page: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = (b.text for b in blocks(ROOT / "docs/how-to/backend.md") if b.title)
    folder = page["target.py"].parent / "targets"
    folder.mkdir()
    (folder / "torch.py").write_text(f"{text}\n\n{page['target.py'].read_text()}")
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(folder)])
    try:
        assert make_target("torch", shout=True).program == "graph.safetensors"
    finally:
        sys.modules.pop(f"{targets.__name__}.torch", None)


def test_the_code_passes_the_checks(page: dict[str, Path]) -> None:
    ours = ["--no-cache", "--config", 'lint.isort.known-first-party=["rolora_passes"]', "--stdin-filename"]
    for place in (
        "rolora_passes/passes/sort_channels.py",
        "tests/test_sort_channels.py",
        "tests/test_asinh.py",
    ):
        text = page[Path(place).name].read_text()
        for command in (["check"], ["format", "--check", "--diff"]):
            ruff = [sys.executable, "-m", "ruff", *command, *ours, str(ROOT / place), "-"]
            done = subprocess.run(ruff, input=text, capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stdout + done.stderr


def test_the_targets_exist() -> None:
    text, makefile = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([\w-]+)`", text))
    assert {"test", "test-all", "demo"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_groups_of_tests_reach_the_scheduler(request: pytest.FixtureRequest) -> None:
    """pytest-xdist loses them, and says nothing, with a pytest it does not know: all is captured twice."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("run without --dist loadgroup")
    assert request.node.nodeid.endswith("@test_contributing")
