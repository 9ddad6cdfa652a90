"""README is run: its programs, its commands in the order they stand in, and every option that it names.

A block or a command that is not known here fails: say how it is run, or why it is not.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomized
from tiny_checkpoint import TEXT, save_byte_checkpoint

import rolora_passes
from rolora_passes import AddLoRA, FoldConstants, FuseNorm, Rotate, apply_passes
from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.cli.main import RENAMED, commands, main, parser
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.export.onnx.runner import OnnxProgram
from rolora_passes.graphs import capture
from rolora_passes.graphs.graph import run
from rolora_passes.graphs.verify import relative_error
from rolora_passes.loading.models import load_model
from rolora_passes.passes.rilq import RILQ

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
# What is not run, and why.
NOT_RUN = {
    "make demo": "CI runs it: it installs the package and compiles a model of 135 M",
    "make test": "this is one of its tests",
}
# What stands for a user's own: R and T are his recipe and text. lm-eval's tasks are fetched, hence a file.
OWN = {
    "R": "rotated-8da4w",
    "T": "wikitext2.txt",
    "OUT": "out",
    "[NAME]": "rotate",
    "piqa,arc_easy": "quiz.jsonl",
}
# What makes commands small; where an option is given twice, the last one counts.
WINDOWS, DATA = "--window 32 --windows 1", "--samples 4 --length 32"
SMALL = {
    "compile": "--max-length 64", "run": "--max-new-tokens 4", "passes": "", "diff": "", "inspect": "",
    "learn": f"{DATA} --set steps=2 --set batch=2", "tune": "--window 64 --epochs 1 --set batch=4",
    "eval": WINDOWS, "diagnose": WINDOWS, **dict.fromkeys(RENAMED, WINDOWS),
}  # fmt: skip


def statements(lines: list[str]) -> Iterator[str]:
    """Lines of a block without their comments; what goes on in the next line is joined."""
    pending = ""
    for line in lines:
        code = re.sub(r"(^|\s{1,})#\s.*$", "", line).rstrip()
        pending = f"{pending}{code.strip()}" if pending else code.strip()
        if pending.endswith("\\"):
            pending = pending[:-1]
        elif pending.count("(") > pending.count(")"):
            pending += " "
        elif pending:
            yield pending
            pending = ""


def indented(text: str) -> list[str]:
    """The statements of a text's indented blocks, in order."""
    lines = without_programs(text).splitlines()
    return list(statements([line for line in lines if line.startswith("    ")]))


def without_programs(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


SECTIONS = {part.partition("\n")[0]: indented(part) for part in README.split("\n## ")[1:]}
SECTIONS = {title: found for title, found in SECTIONS.items() if found}
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def is_command(statement: str) -> bool:
    return statement.split()[0] in ("rolora", "make")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_checkpoint(tmp_path_factory.mktemp("readme") / "MODEL", layers=1)


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that README names, to work in."""
    shutil.copytree(checkpoint, tmp_path / "MODEL")
    (tmp_path / "wikitext2.txt").write_text(TEXT)
    (tmp_path / "c4.jsonl").write_text(json.dumps({"text": TEXT}))
    rows = [{"instruction": f"say {n}", "output": f"{n}, and {n} again"} for n in range(12)]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    question = {"question": "Two and one", "choices": ["4", "3"], "answer": 1}
    (tmp_path / "quiz.jsonl").write_text("\n".join([json.dumps(question)] * 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def captured(checkpoint: Path) -> Any:
    return capture(load_model(str(checkpoint))[0])


def adapter(checkpoint: Path, folder: Path) -> Path:
    """An adapter for the model, as PEFT would have it."""
    graph = randomized(apply_passes(captured(checkpoint), [AddLoRA(rank=2)]), "lora_")
    return save_adapter(graph, folder)


def test_the_first_program_gives_the_logits_of_its_graph(place: Path, checkpoint: Path) -> None:
    (program,) = PROGRAMS
    model, tokenizer = load_model(str(checkpoint))
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    exec(program, names)
    tokens = torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = run(names["graph"], tokens)[:, -1]
    assert relative_error(expected, model(tokens).logits[:, -1].detach()) < 1e-4
    pte, onnx = load_pte(place / "model.pte"), OnnxProgram(place / "folder")
    runtimes: list[Callable[[Any, int], Any]] = [
        lambda new, at: pte(new.contiguous(), torch.tensor([at])),
        onnx,
    ]
    for step in runtimes:
        step(tokens[:, :8], 0)
        assert relative_error(step(tokens[:, 8:], 8)[:, -1], expected) < 1e-3
    import onnxruntime_genai

    onnxruntime_genai.Model("folder")  # as the program's comment says


def test_adapters_in_python(place: Path, checkpoint: Path) -> None:
    load, save, train = (s for s in SECTIONS["Adapters"] if not is_command(s))
    adapter(checkpoint, place / "folder")
    base = apply_passes(captured(checkpoint), [FuseNorm(), Rotate(), FoldConstants()])
    names: dict[str, Any] = {**vars(rolora_passes), "save_adapter": save_adapter}
    names["graph"] = apply_passes(base, [eval(load, names)])
    exec(save, names)
    names["graph"], names["tokens"] = base, torch.randint(0, 250, (8, 16))
    names["RILQ"] = partial(RILQ, steps=2, batch=2)
    exec(train, names)


@pytest.mark.parametrize("section", SECTIONS)
def test_commands(
    section: str, place: Path, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # the runtimes print to the descriptors themselves
    if "adapters/fr" in str(SECTIONS[section]):
        for name in ("fr", "code"):
            adapter(checkpoint, place / "adapters" / name)
    for line in filter(is_command, SECTIONS[section]):
        if line in NOT_RUN:
            assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            continue
        _, command, *arguments = [OWN.get(word, word) for word in shlex.split(line)]
        more = SMALL[command] + (f" {DATA}" if "--calibration" in arguments and command != "learn" else "")
        assert main([command, *arguments, *more.split()]) == 0, f"{line}\n{capfd.readouterr().err}"


def test_all_is_known() -> None:
    assert len(PROGRAMS) == README.count("```") // 2 == 1
    assert {title for title, found in SECTIONS.items() if any(not is_command(s) for s in found)} == {
        "Adapters"
    }
    shown = {line.split()[1] for found in SECTIONS.values() for line in found if line.startswith("rolora")}
    assert {RENAMED.get(name, (name,))[0] for name in shown} == {*commands()}
    assert all(line in NOT_RUN for found in SECTIONS.values() for line in found if line.startswith("make"))


def test_every_option_that_is_named_exists() -> None:
    (choices,) = (a for a in parser()._actions if isinstance(a.choices, dict))
    known = {option for one in choices.choices.values() for option in one._option_string_actions}
    code = " ".join(re.findall(r"`[^`]+`", without_programs(README)))
    named = set(re.findall(r"(?<=[`\s])--[a-z][a-z-]+", code))
    assert {"--fast-prefill", "--accuracy-level", "--work"} <= named
    assert named - known == {"--nproc-per-node"}, "torchrun's own"
