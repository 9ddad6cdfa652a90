"""What the package needs for what: pyproject's extras, and work that goes on without them."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_checkpoint import save_byte_checkpoint

import rolora_passes
from rolora_passes import FoldConstants, FuseNorm, QuantizeWeights, apply_passes
from rolora_passes.errors import MissingExtraError
from rolora_passes.graphs import capture, run, save_graph
from rolora_passes.loading.models import load_model, load_tokenizer

ROOT = Path(rolora_passes.__file__).parent
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Nothing of these is at hand, as in an environment that was made to load and lower graphs.
WITHOUT = """
import sys
GONE = {"transformers", "tokenizers", "huggingface_hub", "gguf", "accelerate", "peft", "lm_eval", "datasets",
        "matplotlib", "plotly"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
LOWER = """
import torch
from rolora_passes import QuantizeActivations, apply_passes
from rolora_passes.export import to_executorch, to_onnx
from rolora_passes.graphs import load_graph, run

torch.set_num_threads(1)
tokens, expected = torch.load("expected.pt")
graph = load_graph("graph.safetensors")
torch.testing.assert_close(run(graph, tokens), expected)
graph = apply_passes(graph, [QuantizeActivations(8)])
to_executorch(graph, "model.pte", max_length=64, check=False)
to_onnx(graph, "folder", max_length=64, check=False)
"""


def test_a_saved_graph_is_lowered_without_transformers(tmp_path: Path) -> None:
    model, _ = load_model(str(save_byte_checkpoint(tmp_path / "MODEL", layers=1)))
    graph = apply_passes(capture(model), [FuseNorm(), QuantizeWeights(4, 32), FoldConstants()])
    tokens = torch.randint(0, 250, (1, 9))
    torch.save((tokens, run(graph, tokens)), tmp_path / "expected.pt")
    save_graph(graph, tmp_path / "graph.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + LOWER],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.pte").is_file() and (tmp_path / "folder" / "model.onnx").is_file()


@pytest.mark.parametrize("missing", ["transformers", "gguf", "accelerate"])
def test_what_needs_one_names_it(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"{missing} is not installed: run .*rolora-passes\[gguf\]"):
        load_model(str(tmp_path / "model.gguf"))
    if missing == "transformers":
        with pytest.raises(MissingExtraError, match=r"rolora-passes\[transformers\]"):
            load_tokenizer("none")


def required() -> set[tuple[str, str]]:
    """(module, extra) of every call of `require` that names both."""
    found = set()
    for path in ROOT.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "require" and len(call.args) == 2:
                module, extra = call.args
                if isinstance(module, ast.Constant) and isinstance(extra, ast.Constant):
                    found.add((module.value.partition(".")[0], extra.value))
    return found


def brought(extra: str) -> set[str]:
    """The packages that an extra names, as they are imported."""
    found = set()
    for requirement in EXTRAS[extra]:
        name, _, others = re.split(r"[>=<]", requirement)[0].partition("[")
        if name == PROJECT["name"]:
            found |= {one for other in others.rstrip("]").split(",") for one in brought(other)}
        else:
            found.add(name.replace("-", "_"))
    return found


def test_every_extra_that_an_error_names_brings_what_is_missing() -> None:
    besides = {"executorch": {"pytorch_tokenizers"}, "eval": {"numpy"}}  # what those bring in turn
    assert len(required()) > 10
    for module, extra in required():
        assert module in brought(extra) | besides.get(extra, set()), f"{module} with {extra}"


def test_all_is_all_extras_for_users() -> None:
    (everything,) = EXTRAS["all"]
    listed = everything.partition("[")[2].rstrip("]").split(",")
    assert set(listed) == EXTRAS.keys() - {"all", "dev", "docs", "cuda"}  # which needs a GPU's compiler


def test_an_extra_brings_all_that_its_commands_need() -> None:
    for extra in ("gguf", "eval", "learn", "report"):  # with tokenizers, which are transformers'
        assert "transformers" in brought(extra)


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The release script."""
    monkeypatch.syspath_prepend(str(ROOT.parent / "scripts"))
    return importlib.import_module("release")


def test_the_release_script_uses_what_every_extra_brings(release: ModuleType) -> None:
    assert release.USES.keys() == EXTRAS.keys() - {"all", "dev", "cuda"} | {"none"}
    assert release.brought("all") == EXTRAS.keys() - {"dev", "docs", "cuda"} | {"none"}
    assert release.brought("learn") == {"none", "transformers", "learn"}
    code = [c[2] for uses in release.USES.values() for c in uses if c[:2] == ["python", "-c"]]
    assert len(code) == 3
    for one in (release.FIXTURE, *code):
        compile(one, "release", "exec")


@pytest.mark.parametrize(
    ("said", "missing", "good"),
    [
        (
            "error: MissingExtraError: x is not installed: run `pip install rolora-passes[onnx]`",
            {"onnx"},
            True,
        ),
        (
            "error: MissingExtraError: x is not installed: run `pip install rolora-passes[onnx]`",
            {"eval"},
            False,
        ),
        ("error: MissingExtraError: x is not installed: run `pip install rolora-passes[onnx]`", set(), False),
        ("ModuleNotFoundError: No module named 'onnx'", {"onnx"}, False),
        ("", {"onnx"}, False),
    ],
)
def test_the_release_script_wants_the_extra_named(
    release: ModuleType, said: str, missing: set[str], good: bool
) -> None:
    environment = object.__new__(release.Environment)
    environment.call = lambda command: subprocess.CompletedProcess(command, 2, "", f"a warning\n{said}\n")
    with nullcontext() if good else pytest.raises(SystemExit, match="found 2"):
        environment.use(["rolora", "compile"], missing)


def test_the_wheel_has_no_module_that_an_earlier_build_left(
    release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("build/lib", "build/site", "dist"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "build" / "lib" / "deleted.py").touch()
    wheel = tmp_path / "dist" / "new.whl"
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release.subprocess, "run", lambda *_, **__: wheel.touch())
    assert release.build() == wheel
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["site"]
