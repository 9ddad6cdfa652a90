"""What differs between Linux, macOS and Windows, as far as it can be seen from one of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

import rolora_passes
from rolora_passes.files import writing, writing_folder
from rolora_passes.memory import peak_mb
from rolora_passes.passes.rotate import Rotate
from rolora_passes.recipes import dump_recipe

ROOT = Path(rolora_passes.__file__).parent
# Modules that Windows lacks; a function may import one, and do without.
POSIX = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog"}


NOT_FILES = {"os.open", "self._open"}  # calls of that name that open no file as text


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text: in cp1252 on Windows, unless it names an encoding."""
    name, text = ast.unparse(call.func).rpartition(".")[2], [ast.unparse(a) for a in call.args]
    if name in ("read_text", "write_text"):
        return len(text) == (name == "write_text")
    binary = any(set(mode) <= set("'rwxab+") and "b" in mode for mode in text)
    return name in ("open", "fdopen") and ast.unparse(call.func) not in NOT_FILES and not binary


def test_text_is_utf8_everywhere() -> None:
    found = []
    for path in ROOT.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and opens_text(call) and "encoding=" not in ast.unparse(call):
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert not found


def test_what_windows_lacks_is_imported_late() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not POSIX & set(names), f"{path.name} imports {names} at its top"


def test_the_package_holds_no_symbolic_link() -> None:
    assert not [path for path in ROOT.rglob("*") if path.is_symlink()]
    for path in ROOT.rglob("*.py"):
        text = path.read_text("utf-8")
        assert "symlink" not in text and "os.fork" not in text and "os.link" not in text, path.name


def test_imports_and_runs_without_what_windows_lacks(tmp_path: Path) -> None:
    code = (
        "import sys, os, contextlib\n"
        "with contextlib.suppress(ImportError): import psutil  # what transformers reads has its own ways\n"
        f"for name in {sorted(POSIX)}: sys.modules[name] = None\n"
        "def none(*args, **kwargs): raise OSError('no symbolic links here')\n"
        "os.symlink = none\n"
        "import rolora_passes, rolora_passes.export, rolora_passes.cli, rolora_passes.reporting\n"
        "import torch\n"
        "from architectures import tiny\n"
        "from rolora_passes.graphs import capture, save_graph, load_graph\n"
        "graph = capture(tiny('llama', torch.float32))\n"
        "steps = ['fuse-norm', 'rotate', 'fold-constants']\n"
        "graph = rolora_passes.apply_passes(graph, steps)\n"
        "load_graph(save_graph(graph, sys.argv[1]))\n"
        "print(*rolora_passes.history(graph), sep=chr(10))\n"
    )
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    command = [sys.executable, "-c", code, str(tmp_path / "graph.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "fold-constants" in done.stdout and "peak 0 MB" in done.stdout


def test_paths_in_recipes_are_written_with_slashes() -> None:
    """A recipe that Windows wrote is read on other systems."""
    step = Rotate(given=PureWindowsPath("learned\\R.bin"))  # type: ignore[arg-type]
    assert "learned/R.bin" in dump_recipe([step])


@pytest.mark.skipif(sys.platform == "win32", reason="`resource` is what other systems have")
def test_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10 < peak_mb() < 1e6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_mb() == 0


def test_folders_are_replaced_without_renaming_over_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows renames a file over a file, but nothing over a folder."""
    rename = os.replace

    def windows(source: Path, target: Path) -> None:
        if Path(target).is_dir():
            raise PermissionError(13, "Access is denied", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", windows)
    for text in ("first", "second"):
        with writing_folder(tmp_path / "made") as folder:
            (folder / "file.txt").write_text(text, "utf-8")
        with writing(tmp_path / "one.txt") as file:
            file.write_text(text, "utf-8")
    assert (tmp_path / "made" / "file.txt").read_text("utf-8") == "second"
    assert (tmp_path / "one.txt").read_text("utf-8") == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "one.txt"]
