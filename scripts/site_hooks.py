"""What the site shows of the package itself, written when the site is built, so that it is never stale.

A page says `<!-- generated: NAME -->` or `<!-- generated: NAME ARGUMENT -->`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
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
    from rolora_passes.cli.main import _parser

    os.environ["COLUMNS"] = "100"
    (group,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = [f"## {name}\n\n```text\n{one.format_help()}```" for name, one in sorted(group.choices.items())]
    return "\n\n".join(parts)


def passes() -> str:
    """What `rolora passes NAME` prints, of every pass, under the name of its class."""
    from rolora_passes.cli.passes import documents
    from rolora_passes.passes.registry import PASSES, pass_class

    parts = []
    for name in PASSES:
        cls = pass_class(name)
        options = ", ".join(f"{p.name}={p.default!r}" for p in inspect.signature(cls).parameters.values())
        text = "\n\n".join(documents(cls))
        parts.append(f"## {name}\n\n`{cls.__name__}({options})` is {cls.kind}.\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def recipes() -> str:
    """Every recipe as YAML."""
    from rolora_passes.recipes import dump_recipe, load_recipe, recipe_names

    return "\n\n".join(f"## {n}\n\n```yaml\n{dump_recipe(load_recipe(n))}```" for n in recipe_names())


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
