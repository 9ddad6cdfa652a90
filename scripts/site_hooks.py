"""What the site shows of the package itself, written when the site is built, so that it is never stale.

A page says `<!-- generated: NAME -->` or `<!-- generated: NAME ARGUMENT -->`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import house

MARK = re.compile(r"^<!-- generated: (\w+)(?: ([\w.]+))? -->$", flags=re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with every page."""
    return MARK.sub(lambda found: GENERATED[found[1]](*filter(None, [found[2]])), markdown)


def commands() -> str:
    """What `rolora COMMAND --help` prints, of every command."""
    from rolora_passes.cli.main import parser

    os.environ["COLUMNS"] = "100"
    (group,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = [f"## {name}\n\n```text\n{one.format_help()}```" for name, one in sorted(group.choices.items())]
    return "\n\n".join(parts)


def passes() -> str:
    """What `rolora passes NAME` prints, of every pass, under the name of its class."""
    from rich.console import Console

    from rolora_passes.cli.passes import explain
    from rolora_passes.passes.registry import PASSES

    parts = []
    for name in PASSES:
        screen = Console(file=io.StringIO(), width=100, record=True)
        explain(PASSES[name], screen)
        parts.append(f"## {name}\n\n```text\n{screen.export_text()}```")
    return "\n\n".join(parts)


def recipes() -> str:
    """What every recipe does; as YAML those that take no setting."""
    from rolora_passes.recipes import dump_recipe, load_recipe
    from rolora_passes.recipes import recipes as known

    rows = [f"| `{recipe.example}` | {recipe.about} |" for recipe in known().values()]
    table = "\n".join(["| recipe | what it does |", "|---|---|", *rows])
    files = [name for name, recipe in known().items() if not recipe.takes_setting]
    texts = [f"## {name}\n\n```yaml\n{dump_recipe(load_recipe(name))}```" for name in files]
    return "\n\n".join([table, *texts])


def reference(module: str) -> str:
    """The public names of a module, for mkdocstrings; passes have a page of their own."""
    from rolora_passes.passes.base import Pass

    found = importlib.import_module(module)
    names = [name for name in sorted(found.__all__, key=str.lower) if not name.startswith("_")]

    def is_pass(name: str) -> bool:
        value = getattr(found, name)
        return isinstance(value, type) and issubclass(value, Pass) and value is not Pass

    return "\n\n".join(f"::: {module}.{name}" for name in names if not is_pass(name))


GENERATED = {
    "commands": commands,
    "passes": passes,
    "recipes": recipes,
    "reference": reference,
    "house": house.draw,
}
