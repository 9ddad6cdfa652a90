"""The commands as a whole: found without a table, explained alike, with examples that are right."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tiny_checkpoint import TEXT, save_checkpoint

from rolora_passes.cli import main
from rolora_passes.cli.main import RENAMED, commands, parser
from rolora_passes.cli.options import spilling_to
from rolora_passes.cli.parser import Help, byte_size
from rolora_passes.cli.passes import explained
from rolora_passes.passes.registry import PASSES, make_pass

Run = Callable[..., tuple[int, str, str]]


def parsers() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (a for a in parser()._actions if isinstance(a.choices, dict))
    return dict(choices.choices)  # type: ignore[arg-type]


def options(one: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in one._actions:
        if action.help != argparse.SUPPRESS and action.dest != "help":
            yield action


@pytest.mark.parametrize("name", commands())
def test_every_option_says_its_default_or_that_it_is_required(name: str) -> None:
    one = parsers()[name]
    shown = Help("rolora")
    for action in options(one):
        words = shown._get_help_string(action)
        assert action.help and len(action.help) > 3, f"{name} {action.dest} has no help"
        assert "default: " in words or "required" in words, f"{name} {action.dest}: {words}"
        none = (None, [], argparse.SUPPRESS)
        assert "default: none" not in words or action.default in none, f"{name} {action.dest}: {words}"
    assert "examples:\n" in one.format_help()


def test_defaults_that_are_shown_are_those_of_the_parser() -> None:
    text = " ".join(parsers()["eval"].format_help().split())
    assert "--window TOKENS tokens in a window (integer >= 2; default: 2048)" in text
    assert "--no-verify skip the check of exact passes (default: off)" in text
    assert "-o FOLDER, --output FOLDER folder to write (path; required)" in " ".join(
        parsers()["compile"].format_help().split()
    )
    assert "default: 0.0)" in " ".join(parsers()["run"].format_help().split())


@pytest.mark.parametrize(
    "example", [example for module in commands().values() for example in module.EXAMPLES]
)
def test_examples_are_commands(example: str) -> None:
    words = shlex.split(example)
    assert words[0] == "rolora" or words[:3] == ["torchrun", "-m", "rolora_passes"]
    found = parser().parse_args(words[1 if words[0] == "rolora" else 3 :])
    assert callable(found.run)


def test_a_command_is_a_module_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rolora_passes.cli

    (tmp_path / "greet.py").write_text(
        "ORDER, SUMMARY, EXAMPLES = 55, 'say a word', ('rolora greet hello',)\n"
        "def add(parser): parser.add_argument('word', help='what to say')\n"
        "def run(options): print(options.word)\n"
    )
    monkeypatch.setattr(rolora_passes.cli, "__path__", [*rolora_passes.cli.__path__, str(tmp_path)])
    names = [*commands()]
    assert names.index("eval") < names.index("greet") < names.index("diagnose")
    assert main(["greet", "hello"]) == 0


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_work_and_say_the_new_one(old: str, rolora: Run, tmp_path: Path) -> None:
    arguments = (tmp_path, "--recipe", "8da4w", "--text", tmp_path / "none.txt")
    status, _, said = rolora(old, *arguments)
    assert status == 2 and "DataError" in said
    note = f"rolora {old} is `rolora {' '.join(RENAMED[old])}` now; the old name goes in 0.3\n"
    assert said.startswith(note)
    assert rolora(*RENAMED[old], *arguments) == (2, "", said.removeprefix(note))


def test_old_options_work() -> None:
    given = ["M", "--recipe", "R", "--text", "T"]
    found = parser().parse_args(["diagnose", "bisect", *given, "--most", "2"])
    assert found.top == 2
    assert parser().parse_args(["diagnose", "ablate", *given, "--leave", "hadamards"]).drop == "hadamards"
    assert parser().parse_args(["diagnose", "ablate", *given]).drop is None


def test_options_of_another_diagnosis_are_refused(rolora: Run) -> None:
    given = ("M", "--recipe", "R", "--text", "T")
    for what, option, own in (
        ("errors", ("--drop", "hadamards"), "ablate"),
        ("sensitivity", ("--below", "3"), "errors"),
        ("ablate", ("--good", "G"), "bisect"),
    ):
        status, _, said = rolora("diagnose", what, *given, *option)
        assert status == 2 and f"{option[0]} with `rolora diagnose {own}` only: leave it out" in said
    status, _, said = rolora("diagnose", "errors", "M", "--text", "T")
    assert status == 2 and "expected either --recipe, or --good" in said


# Memory.


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("512MB", 512 * 10**6), ("1.5 GiB", 3 * 2**29), ("2tb", 2 * 10**12)],
)
def test_sizes(text: str, expected: int) -> None:
    assert byte_size(text) == expected


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "0GB", "8 gigabytes", "1e9", ""])
def test_what_is_no_size_says_what_is_expected(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["eval", "M", f"--memory={text}"])
    assert (
        f"--memory: expected a size such as 8GB, 512MB or 1.5GiB, found {text!r}" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["compile", "eval", "learn", "tune", "inspect", "diff"])
def test_bounds_of_memory_hold_while_a_command_runs(command: str, tmp_path: Path) -> None:
    more = ["O"] if command == "diff" else ["--recipe", "R"]
    output = [] if command in ("inspect", "diff") else ["-o", str(tmp_path / "out")]
    given = [command, "M", *more, *output]
    with spilling_to(parser().parse_args([*given, "--memory", "8GB", "--spill-limit", "1TB"])) as spill:
        beside = tmp_path if output else Path(tempfile.gettempdir())
        assert (spill.folder, spill.limit, spill.memory) == (beside, 10**12, 8 * 10**9)
    with spilling_to(parser().parse_args([*given, "--spill", "scratch"])) as spill:
        assert (spill.folder, spill.limit, spill.memory) == (Path("scratch"), None, None)
    with spilling_to(parser().parse_args(["passes"])) as spill:
        assert spill is None


# Passes.


@pytest.mark.parametrize("name", PASSES)
def test_every_option_of_a_pass_is_explained(name: str) -> None:
    cls = PASSES[name]
    known = explained(cls)
    assert known.keys() == {field.name for field in dataclasses.fields(cls)}
    assert all(len(about.meaning) > 3 for about in known.values())


def test_units_and_inherited_meanings_are_read_from_docstrings() -> None:
    assert explained(PASSES["quantize-weights"])["group_size"].unit == "channels"
    assert explained(PASSES["quantize-kv-cache"])["values"].unit == "bits"
    loss = explained(PASSES["tune-lora"])["loss"].meaning
    assert loss.startswith('"cross-entropy"') and loss.endswith("see rilq.") and "\n" not in loss


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_shows_how_it_is_used(name: str, rolora: Run, tmp_path: Path) -> None:
    status, printed, said = rolora("passes", name)
    assert status == 0, said
    cls = PASSES[name]
    kind = cls.kind if isinstance(cls.kind, str) else "by its options"
    assert printed.startswith(f"{name}, {kind}: ")
    lines = printed.splitlines()
    entry = yaml.safe_load(lines[lines.index("    passes:") + 1])
    call = printed.rpartition("apply_passes(graph, [")[2].removesuffix("])\n")
    names: dict[str, object] = {}
    exec(lines[lines.index("In Python:") + 1].strip(), names)
    assert make_pass(entry[0]) == eval(call, names) == cls()
    commands = [line.split() for line in lines if line.startswith("    rolora ")]
    assert commands and all(parser().parse_args(words[1:]).model == "MODEL" for words in commands)
    for field in dataclasses.fields(cls):
        (row,) = (line for line in lines if line.startswith(f"{field.name} "))
        assert field.default == () or str(field.default) in row


def test_passes_and_recipes_are_one_table(rolora: Run) -> None:
    printed = rolora("passes")[1]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in printed.splitlines() if line[0] != " "}
    assert rows.keys() >= {*PASSES, "name", "8da4w", "quarot:W4A4KV4"}
    assert rows["rotate"].startswith("exact Change the basis of the residual stream")
    assert rows["rilq"].startswith("trained ") and rows["quantize-weights"].startswith("lossy ")
    assert rows["float"].startswith("recipe ")


# Imports.


def test_help_imports_no_torch() -> None:
    """Torch takes seconds, in which nothing is shown and Ctrl-C would give a traceback."""
    code = (
        "import contextlib, sys, rolora_passes.cli\n"
        "for words in (['--help'], ['diagnose', '--help'], ['inspect', '--help'], ['passes', '--help']):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        rolora_passes.cli.main(words)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("usage: rolora") == 4, done.stderr


def test_what_the_package_offers_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, rolora_passes\n"
        "assert 'torch' not in sys.modules and rolora_passes.__version__\n"
        "from rolora_passes import FuseNorm, apply_passes\n"
        "assert {'Rotate', 'Pass', 'history'} < {*rolora_passes.__all__} <= {*dir(rolora_passes)}\n"
        "assert not hasattr(rolora_passes, 'Nothing') and not hasattr(rolora_passes, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Small faults.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_a_place_for_graphs_that_cannot_be_written_is_refused(tmp_path: Path, rolora: Run) -> None:
    (tmp_path / "file").write_text("in the way")
    given = ("./none", "--recipe", "8da4w", "--print-to", tmp_path / "file" / "graphs")
    for command in (
        ("compile", *given, "-o", tmp_path / "out"),
        ("eval", *given, "--text", tmp_path / "file"),
    ):
        status, _, said = rolora(*command)
        assert status == 2 and "NotADirectoryError" in said, said


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "MODEL", "--recipe", "8da4w"),
        ("diff", "MODEL", "--recipe", "8da4w"),
        ("diagnose", "errors", "MODEL", "--recipe", "8da4w", "--text", "TEXT", "--window", "32"),
        ("diagnose", "sensitivity", "MODEL", "--recipe", "gptq:W4A8", "--text", "TEXT", "--window", "32"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_calibration_that_no_pass_looks_at_is_said_so(
    command: tuple[str, ...], checkpoint: Path, tmp_path: Path, rolora: Run
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    places = {"MODEL": str(checkpoint), "TEXT": str(tmp_path / "text.txt")}
    status, _, said = rolora(*[places.get(word, word) for word in command], "--calibration", places["TEXT"])
    assert status == 0 and said.count("--calibration was not used") == 1, said


def test_ctrl_c_while_commands_are_loaded(monkeypatch: pytest.MonkeyPatch, rolora: Run) -> None:
    def stop(only: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["rolora_passes.cli.main"], "parser", stop)
    assert rolora("passes") == (130, "", "interrupted; nothing was written\n")
