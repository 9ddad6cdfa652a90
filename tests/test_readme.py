"""README and the site are run: their programs, their commands, and every option that they name."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import randomized
from pages import NOT_RUN, PACKAGES, PAGES, ROOT, SMALL, blocks, commands, run_page
from tiny_checkpoint import TEXT, save_byte_checkpoint

from rolora_passes import AddLoRA, apply_passes
from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.cli.main import commands as all_commands
from rolora_passes.cli.main import parser
from rolora_passes.errors import PassError, VerificationError
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.export.onnx.runner import OnnxProgram
from rolora_passes.graphs import capture
from rolora_passes.graphs.operators import operators
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error
from rolora_passes.loading.models import load_model

README = ROOT / "README.md"
CODE = [path for path in PAGES if any(block.language != "text" for block in blocks(path))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_checkpoint(tmp_path_factory.mktemp("readme") / "MODEL", layers=1)


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files that the pages name, to work in."""
    shutil.copytree(checkpoint, tmp_path / "MODEL")
    (tmp_path / "wikitext2.txt").write_text(TEXT)
    (tmp_path / "c4.jsonl").write_text(json.dumps({"text": TEXT}))
    rows = [{"instruction": f"say {n}", "output": f"{n}, and {n} again"} for n in range(12)]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    question = {"question": "Two and one", "choices": ["4", "3"], "answer": 1}
    (tmp_path / "quiz.jsonl").write_text("\n".join([json.dumps(question)] * 2))
    monkeypatch.chdir(tmp_path)
    (tmp_path / PACKAGES).mkdir()
    modules = {*sys.modules}
    monkeypatch.setattr(sys, "path", [str(tmp_path / PACKAGES), *sys.path])
    yield tmp_path
    for name in {*sys.modules} - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    monkeypatch.undo()
    operators.cache_clear()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a module for a page's programs; classes are looked up by the module that they are of."""
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    return vars(page)


def adapter(checkpoint: Path, folder: Path) -> Path:
    """An adapter for the model, as PEFT would have it."""
    graph = apply_passes(capture(load_model(str(checkpoint))[0]), [AddLoRA(rank=2)])
    return save_adapter(randomized(graph, "lora_"), folder)


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
@pytest.mark.usefixtures("capfd")  # the runtimes print to the descriptors themselves
def test_page(path: Path, place: Path, checkpoint: Path, names: dict[str, Any]) -> None:
    if "adapters/fr" in path.read_text("utf-8"):
        for name in ("fr", "code"):
            adapter(checkpoint, place / "adapters" / name)
    if path == README:
        names["model"], names["tokenizer"] = load_model(str(checkpoint))
    run_page(path, names)
    if path == README:
        check_programs(place, names)


@pytest.mark.parametrize(
    ("true", "false", "error"),
    [
        ("return x * factors", "return x.abs() * factors", VerificationError),  # its rule frees too much
        ('others="orthogonal"', "others=None", AssertionError),  # the class is not rotated
        ("forth=swapped", "forth=lambda x, *_: x", AssertionError),
        ("back=swapped", "back=lambda x, *_: x", PassError),
    ],
)
@pytest.mark.usefixtures("capfd")
def test_the_checks_of_an_operator_can_fail(
    true: str, false: str, error: type[Exception], place: Path, names: dict[str, Any]
) -> None:
    text, page = (ROOT / "docs/how-to/operator.md").read_text("utf-8"), place / "wrong.md"
    assert text.count(true) == 1
    own = "acme_" + "".join(filter(str.isalpha, false))  # torch keeps the operators that it knows
    text = text.replace(true, false).replace("acme::", f"{own}::").replace("ops.acme.", f"ops.{own}.")
    page.write_text(text, "utf-8")
    with pytest.raises(error):
        run_page(page, names)


def check_programs(place: Path, names: dict[str, Any]) -> None:
    """What README's program wrote gives the logits of its graph, which are the model's."""
    tokens = torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = run(names["graph"], tokens)[:, -1]
    assert relative_error(expected, names["model"](tokens).logits[:, -1].detach()) < 1e-4
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


def test_every_command_is_shown() -> None:
    lines = [line for path in CODE for b in blocks(path) if b.language == "sh" for line in commands(b.text)]
    shown = {line.split()[1] for line in lines if line.startswith("rolora ")}
    assert shown == SMALL.keys() == {*all_commands()}
    makefile = (ROOT / "Makefile").read_text()
    for line in lines:
        if line.startswith("make"):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line
    assert {line for line in lines if not line.startswith(("rolora ", "make ", "pip "))} < NOT_RUN.keys()


def test_every_option_that_is_named_exists() -> None:
    (group,) = (a for a in parser()._actions if isinstance(a.choices, dict))
    known = {option for one in group.choices.values() for option in one._option_string_actions}
    text = " ".join(path.read_text("utf-8") for path in PAGES if path.name != "benchmarks.md")
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    code = " ".join(re.findall(r"`[^`]+`", outside))
    named = set(re.findall(r"(?<=[`\s])--[a-z][a-z-]+", code))
    assert {"--accept-loss", "--accuracy-level", "--work"} <= named
    # torchrun's own, and those of scripts of the repository
    assert named - known == {"--nproc-per-node", "--picture"}


def test_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 130
