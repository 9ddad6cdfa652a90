"""A target of another package: found by its entry point, and used from the command line like ours."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoint import save_byte_checkpoint

from rolora_passes.cli import main
from rolora_passes.errors import LoweringError, PluginError
from rolora_passes.evaluation import ProgramScorer
from rolora_passes.export import compile_model, targets
from rolora_passes.export.target import TARGETS, make_target

ECHO = '''
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from rolora_passes.errors import LoweringError, PluginError
from rolora_passes.export import Target
from rolora_passes.graphs import load_graph, save_graph
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.running import run
from rolora_passes.graphs.info import info, set_info


@dataclass(frozen=True)
class Written:
    path: Path
    length: int
    seed: int

    def rows(self):
        return [f"{self.path.name}, for {self.length} tokens"]


@dataclass(frozen=True)
class Echo(Target):
    """A graph as it is, run by torch."""

    name: ClassVar[str] = "echo"
    program: ClassVar[str] = "echo.safetensors"
    shout: bool = field(default=False, metadata={"help": "in capitals"})
    seed: int = field(default=0, metadata={"help": "of nothing"})

    def lower(self, graph, folder, *, max_length, methods=None, check=True):
        if any(is_op(node, "fake_quantize") for node in graph.graph.nodes):
            raise LoweringError("an echo rounds no activations")
        set_info(graph, config={**info(graph).config, "shout": self.shout})
        return Written(save_graph(graph, folder / self.program), max_length, self.seed)

    def score(self, folder):
        graph, before = load_graph(folder / self.program), []

        def call(tokens, position):
            before[position:] = tokens[0].tolist()
            return run(graph, torch.tensor([before]))[:, -1:]

        return call

    def run(self, folder, prompt, max_new_tokens, temperature=0.0, on_text=None, begin=0):
        shout = info(load_graph(folder / self.program)).config["shout"]
        text = prompt.upper() if shout else prompt
        on_text(text)
        return text
'''
Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package, which has one target: its name, the target's name and its module's text."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(str(packages))

    def install(package: str, target: str, text: str) -> None:
        module = package.replace("-", "_")
        (packages / f"{module}.py").write_text(text)
        about = packages / f"{module}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[{TARGETS.group}]\n{target} = {module}:Echo\n")

    return install


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_byte_checkpoint(tmp_path / "model", layers=1)


def test_a_target_of_another_package_on_the_command_line(
    checkpoint: Path, tmp_path: Path, install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install("echo-runtime", "echo", ECHO)
    assert list(TARGETS) == ["executorch", "onnx", "echo"]
    folder, text = tmp_path / "out", tmp_path / "text.txt"
    command = ["compile", str(checkpoint), "--recipe", "float", "--max-length", "32", "-o", str(folder)]
    assert main([*command, "--target", "echo", "--echo-shout", "--echo-seed", "3"]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["targets"] == {"echo": {"length": 32, "seed": 3}}
    assert manifest["packages"] == {"echo": "echo-runtime 1.0"}
    (row,) = (row for row in manifest["parity"] if row["name"] == "echo")
    assert row["kl_graph"] < 1e-6 and row["greedy"] == row["of"]
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2)
    measure = ["--text", str(text), "--window", "16", "--windows", "2", "-o"]
    values = []
    for name, source in {"program": [str(folder), "--target", "echo"], "model": [str(checkpoint)]}.items():
        assert main(["eval", *source, *measure, str(tmp_path / f"{name}.json")]) == 0
        values.append(json.loads((tmp_path / f"{name}.json").read_text())["perplexity"][0]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    capfd.readouterr()
    assert main(["run", str(folder), "--prompt", "fox", "--raw"]) == 0
    assert capfd.readouterr().out == "FOX\n"
    assert ProgramScorer(folder).target.name == "echo"
    assert main([*command, "--target", "echo"]) == 0, "a compiled folder may be replaced"


def test_a_target_of_ours_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "echo.py").write_text(ECHO + "\n\nTARGET = Echo\n")
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, f"{targets.__name__}.echo", raising=False)
    assert list(TARGETS) == ["executorch", "onnx", "echo"]
    assert make_target("echo", shout=True).program == "echo.safetensors"


def test_what_a_target_refuses_is_known_before_weights_are_loaded(
    checkpoint: Path, tmp_path: Path, install: Install, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    install("echo-runtime", "echo", ECHO)
    monkeypatch.delattr("transformers.PreTrainedModel.from_pretrained")
    command = ["compile", str(checkpoint), "--recipe", "8da4w", "-o", str(tmp_path / "out")]
    assert main([*command, "--target", "echo"]) == 2
    assert "LoweringError: an echo rounds no activations" in capfd.readouterr().err
    assert main([*command, "--target", "onnx", "--echo-shout"]) == 2
    assert "expected --target echo with --echo-shout, found onnx: add it" in capfd.readouterr().err


def test_two_targets_of_one_name_are_refused(install: Install) -> None:
    install("echo-runtime", "echo", ECHO)
    install("other-echo", "echo", ECHO)
    install("another-onnx", "onnx", ECHO)
    with pytest.raises(PluginError, match="both register a target 'echo': uninstall one") as error:
        make_target("echo")
    assert {"echo-runtime", "other-echo"} <= {*re.findall(r"[\w-]+", str(error.value))}
    with pytest.warns(UserWarning, match="another-onnx 1.0 registers a target 'onnx', which is a name of"):
        assert make_target("onnx").needs == ("onnx_ir",)
    assert make_target("executorch").name == "executorch"


def test_a_name_of_ours_stays_ours_and_the_command_says_so(
    checkpoint: Path, tmp_path: Path, install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install("another-onnx", "onnx", ECHO)
    command = ["compile", str(checkpoint), "--recipe", "float", "--target", "onnx", "--max-length", "32"]
    assert main([*command, "-o", str(tmp_path / "out"), "--no-check"]) == 0
    assert "warning: another-onnx 1.0 registers a target 'onnx'" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("Other = 1", "AttributeError"),
        ("Echo = 1", "which is no target"),
        (ECHO.replace("    def run(", "    def run_it("), "which does not implement run"),
        (
            ECHO.replace("field(default=False, metadata", "field(metadata"),
            "whose option shout has no default",
        ),
        (ECHO.replace('= "echo"', '= "onnx"'), "which calls itself 'onnx'"),
    ],
)
def test_a_target_that_cannot_be_loaded_is_named(text: str, message: str, install: Install) -> None:
    install(f"broken-runtime-{abs(hash(text))}", "broken", text)
    with pytest.raises(PluginError, match=message) as error:
        make_target("broken")
    assert "broken" in str(error.value)
    assert main(["passes", "rotate"]) == 0, "all else goes on"


def test_two_targets_that_would_write_one_file(checkpoint: Path, tmp_path: Path, install: Install) -> None:
    install("other-onnx", "echo", ECHO.replace("echo.safetensors", "model.onnx"))
    with pytest.raises(LoweringError, match=r"different files, found onnx, echo that write model\.onnx"):
        compile_model(str(checkpoint), "float", tmp_path / "out", targets=["onnx", "echo"])


def test_a_target_is_given_a_copy_and_leaves_the_tensors_alone(
    checkpoint: Path, tmp_path: Path, install: Install
) -> None:
    edits = "        graph.lm_head.weight.data.zero_()\n        if any("
    install("editing-echo", "echo", ECHO.replace("        if any(", edits))
    with pytest.raises(LoweringError, match="the target echo wrote into the graph's tensors"):
        compile_model(str(checkpoint), "float", tmp_path / "out", targets=["echo"], max_length=32)
    assert not (tmp_path / "out").exists()


def test_what_fails_in_a_target_is_told_with_its_package(
    checkpoint: Path, tmp_path: Path, install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install("failing-echo", "echo", ECHO.replace("        if any(", "        {}['lost']\n        if any("))
    command = ["compile", str(checkpoint), "--recipe", "float", "-o", str(tmp_path / "out")]
    assert main([*command, "--target", "echo"]) == 2
    assert "PluginError: the target echo of failing-echo 1.0 failed: KeyError" in capfd.readouterr().err


def test_a_report_says_where_the_program_is(checkpoint: Path, tmp_path: Path, install: Install) -> None:
    install("echo-runtime", "echo", ECHO)
    made = compile_model(str(checkpoint), "float", tmp_path / "out", targets=["echo"], max_length=32)
    assert made.lowerings["echo"].path == tmp_path / "out" / "echo.safetensors"
    assert made.lowerings["echo"].path.is_file()


def test_options_that_a_target_does_not_have(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="target onnx has no option 'flavour'; there are flavor, acc"):
        make_target("onnx", flavour="ort")
    with pytest.raises(LoweringError, match="expected a flavor of ort, portable, found 'tflite'"):
        make_target("onnx", flavor="tflite")
    both = [make_target("onnx"), make_target("onnx", flavor="portable")]
    with pytest.raises(LoweringError, match="expected every target once, found onnx, onnx"):
        compile_model(str(checkpoint), "float", tmp_path / "out", targets=both)
