"""What README, CONTRIBUTING and the site show in blocks of code, and how a block is run.

A block or a command that is not known here fails: say how it is run, or why it is not.
"""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from packages import write_metadata

from rolora_passes.cli.main import main
from rolora_passes.graphs.operators import operators
from rolora_passes.recipes import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = "packages"  # of a page's own, as if they were installed
# What is not run, and why.
NOT_RUN = {
    "make": "CI runs it: it makes an environment, in which these tests run",
    "pip": "`make` and the release script run it",
    "python examples/packaged_model.py": "a test of the examples runs it",
}
# What stands for a user's own. lm-eval's tasks are fetched, hence a file.
OWN = {"piqa,arc_easy": "quiz.jsonl"}
# What makes commands small; where an option is given twice, the last one counts.
WINDOWS, DATA = "--window 32 --windows 1", "--samples 4 --length 32"
SMALL = {
    "compile": "--max-length 64", "run": "--max-new-tokens 4", "passes": "", "diff": "", "inspect": "",
    "learn": f"{DATA} --set steps=2 --set batch=2", "tune": "--window 64 --epochs 1 --set batch=4",
    "eval": WINDOWS, "diagnose": WINDOWS, "transform": "",
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block: its language, the file that it stands for, its text, and the line where it begins."""

    language: str
    title: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = path.read_text("utf-8")
    fence = r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$'
    found = re.finditer(fence, text, flags=re.DOTALL | re.MULTILINE)
    return [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start()) + 1) for m in found]


def commands(text: str) -> Iterator[str]:
    """The commands of a block, without comments; what goes on in the next line is joined."""
    for line in text.replace("\\\n", " ").splitlines():
        if code := re.sub(r"(^|\s)#\s.*$", "", line).strip():
            yield code


def run_command(line: str) -> None:
    """Run a command of the command line, made small; others only if they say why they are not run."""
    if line in NOT_RUN or line.split()[0] in NOT_RUN:
        return
    program, command, *arguments = [OWN.get(word, word) for word in shlex.split(line)]
    assert program == "rolora", line
    more = SMALL[command] + (f" {DATA}" if "--calibration" in arguments and command != "learn" else "")
    assert main([command, *arguments, *more.split()]) == 0, line


def install(text: str) -> None:
    """Have a package's entry points found, as its pyproject.toml has them: as if it were installed."""
    project = tomllib.loads(text)["project"]
    write_metadata(Path(PACKAGES), project["name"], project["version"], project["entry-points"])
    sys.path.insert(0, str(Path(PACKAGES).resolve()))  # once more, so that what was found before is not kept
    operators.cache_clear()


def run_page(path: Path, names: dict[str, Any]) -> None:
    """Run the blocks of a page one after the other, in a folder with a folder `PACKAGES` that is on Python's
    path; programs share their names."""
    for block in blocks(path):
        title = block.title
        if block.language == "python" and title:
            (Path(PACKAGES) / title).write_text(block.text)
        elif block.language == "python":
            code = "\n" * block.line + block.text  # so that a traceback has the line of the page
            exec(compile(code, str(path), "exec"), names)
        elif block.language == "sh":
            for line in commands(block.text):
                run_command(line)
        elif block.language == "yaml":
            recipe = Path(title or "own-recipe.yaml")
            recipe.write_text(block.text)
            assert len(load_recipe(str(recipe))) == len(yaml.safe_load(block.text)["passes"])
        elif block.language == "toml":
            install(block.text)
        else:  # what a command printed
            assert block.language == "text", f"{path.name}:{block.line}: {block.language}"
