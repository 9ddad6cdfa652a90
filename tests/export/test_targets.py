"""A target of another package: found by its entry point, and used from the command line like ours."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packages import THIRD_PARTY
from tiny_checkpoint import save_byte_checkpoint

from rolora_passes.cli import main
from rolora_passes.errors import LoweringError, PluginError
from rolora_passes.export import compile_model, targets
from rolora_passes.export.target import TARGETS, make_target

Install = Callable[..., None]
ECHO = (THIRD_PARTY / "acme" / "target.py").read_text("utf-8")


def install_target(install: Install, package: str, target: str, text: str) -> None:
    """Install a package, which has one target: its name, the target's name and its module's text."""
    module = package.replace("-", "_")
    install(package, {TARGETS.group: {target: f"{module}:Echo"}}, **{module: text})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_byte_checkpoint(tmp_path / "model", layers=1)


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
    install()
    monkeypatch.delattr("transformers.PreTrainedModel.from_pretrained")
    command = ["compile", str(checkpoint), "--recipe", "8da4w", "-o", str(tmp_path / "out")]
    assert main([*command, "--target", "echo"]) == 2
    assert "LoweringError: an echo rounds no activations" in capfd.readouterr().err
    assert main([*command, "--target", "onnx", "--echo-shout"]) == 2
    assert "expected --target echo with --echo-shout, found onnx: add it" in capfd.readouterr().err


def test_two_targets_of_one_name_are_refused(install: Install) -> None:
    install()
    install_target(install, "other-echo", "echo", ECHO)
    install_target(install, "another-onnx", "onnx", ECHO)
    with pytest.raises(PluginError, match="both register a target 'echo': uninstall one") as error:
        make_target("echo")
    assert {"acme", "other-echo"} <= {*re.findall(r"[\w-]+", str(error.value))}
    with pytest.warns(UserWarning, match="another-onnx 1.2 registers a target 'onnx', which is a name of"):
        assert make_target("onnx").needs == ("onnx_ir",)
    assert make_target("executorch").name == "executorch"


def test_a_name_of_ours_stays_ours_and_the_command_says_so(
    checkpoint: Path, tmp_path: Path, install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install_target(install, "another-onnx", "onnx", ECHO)
    command = ["compile", str(checkpoint), "--recipe", "float", "--target", "onnx", "--max-length", "32"]
    assert main([*command, "-o", str(tmp_path / "out"), "--no-check"]) == 0
    assert "warning: another-onnx 1.2 registers a target 'onnx'" in " ".join(capfd.readouterr().err.split())


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
    install_target(install, f"broken-runtime-{abs(hash(text))}", "broken", text)
    with pytest.raises(PluginError, match=message) as error:
        make_target("broken")
    assert "broken" in str(error.value)
    assert main(["passes", "rotate"]) == 0, "all else goes on"


def test_two_targets_that_would_write_one_file(checkpoint: Path, tmp_path: Path, install: Install) -> None:
    install_target(install, "other-onnx", "echo", ECHO.replace("echo.safetensors", "model.onnx"))
    with pytest.raises(LoweringError, match=r"different files, found onnx, echo that write model\.onnx"):
        compile_model(str(checkpoint), "float", tmp_path / "out", targets=["onnx", "echo"])


def test_a_target_is_given_a_copy_and_leaves_the_tensors_alone(
    checkpoint: Path, tmp_path: Path, install: Install
) -> None:
    edits = "        graph.lm_head.weight.data.zero_()\n        if any("
    install_target(install, "editing-echo", "echo", ECHO.replace("        if any(", edits))
    with pytest.raises(LoweringError, match="the target echo wrote into the graph's tensors"):
        compile_model(str(checkpoint), "float", tmp_path / "out", targets=["echo"], max_length=32)
    assert not (tmp_path / "out").exists()


def test_what_fails_in_a_target_is_told_with_its_package(
    checkpoint: Path, tmp_path: Path, install: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    install_target(
        install,
        "failing-echo",
        "echo",
        ECHO.replace("        if any(", "        {}['lost']\n        if any("),
    )
    command = ["compile", str(checkpoint), "--recipe", "float", "-o", str(tmp_path / "out")]
    assert main([*command, "--target", "echo"]) == 2
    assert "PluginError: the target echo of failing-echo 1.2 failed: KeyError" in capfd.readouterr().err


def test_a_report_says_where_the_program_is(checkpoint: Path, tmp_path: Path, install: Install) -> None:
    install()
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
