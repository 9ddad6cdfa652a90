"""`rolora passes`: what passes and recipes there are, and what one of them does."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rolora_passes.passes.base import Pass

ORDER = 90
SUMMARY = "list the passes and recipes, or explain one of them"
EXAMPLES = ("rolora passes", "rolora passes quantize-weights", "rolora passes quarot:W4A4KV4")
_OPTION = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*)(?: \((?P<unit>[^)]+)\))?: ")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="a pass, a recipe, or METHOD:SETTING (default: list them all)"
    )


def run(options: argparse.Namespace) -> None:
    from rolora_passes.passes.registry import PASSES
    from rolora_passes.recipes import dump_recipe, load_recipe, recipes

    if options.name is None:
        Console().print(_everything())
    elif options.name.partition(":")[0] in recipes():
        print(dump_recipe(load_recipe(options.name)), end="")
    else:
        explain(PASSES[options.name], Console())


def _everything() -> Table:
    """All passes, recipes and grids; what other packages register, with the package it comes from."""
    from rolora_passes.errors import PluginError
    from rolora_passes.numerics.grids import GRIDS
    from rolora_passes.passes.registry import PASSES
    from rolora_passes.recipes import load_recipe, recipes

    table = _table("name", "kind", "what it does")
    for name in PASSES:
        table.add_row(name, *_about(name))
        for clash in PASSES.clashes(name):
            table.add_row("", "", escape(clash))
    table.add_section()
    for recipe in recipes().values():
        kind = "recipe, any setting" if ":" in recipe.example else "recipe"
        steps = ", ".join(step.name for step in load_recipe(recipe.example))
        table.add_row(recipe.example, kind, escape(f"{recipe.about} Passes: {steps}."))
    table.add_section()
    for name in GRIDS:
        try:
            about = (inspect.getdoc(GRIDS[name]) or "undocumented").partition("\n\n")[0]
            table.add_row(name, "grid", escape(about + _origin(GRIDS.origin(name))))
        except PluginError as error:
            table.add_row(name, "", escape(f"cannot be used: {error}"))
    return table


def _about(name: str) -> tuple[str, str]:
    """The kind of a pass, and the first paragraph of its docstring."""
    from rolora_passes.errors import PluginError
    from rolora_passes.passes.registry import PASSES

    try:
        cls = PASSES[name]
    except PluginError as error:
        return "", escape(f"cannot be used: {error}")
    summary = " ".join(inspect.cleandoc(cls.__doc__ or "undocumented").partition("\n\n")[0].split())
    return _kind(cls), escape(summary + _origin(PASSES.origin(name)))


def _kind(cls: type[Pass]) -> str:
    return cls.kind if isinstance(cls.kind, str) else "by its options"


def _origin(package: str | None) -> str:
    return f" [{package}]" if package else ""


def explain(cls: type[Pass], screen: Console) -> None:
    """Print what a pass does, its options, and how to use it."""
    from rolora_passes.passes.registry import PASSES
    from rolora_passes.recipes import load_recipe, recipes

    name = cls.name
    text = inspect.cleandoc(cls.__doc__ or "")
    body, _, rest = re.sub(r"^Options.*?:\n", "\0", text, count=1, flags=re.MULTILINE).partition("\0")
    raises = re.search(r"^Raises:\n.*", rest or body, flags=re.MULTILINE | re.DOTALL)
    body = body.partition("\nRaises:\n")[0]
    screen.print(f"{name}, {_kind(cls)}: {body.rstrip()}\n", markup=False, highlight=False)
    fields = dataclasses.fields(cls)
    if fields:
        screen.print(_options(cls, explained(cls)))
    if raises:
        screen.print(f"\n{raises[0].rstrip()}", markup=False, highlight=False)
    shown = {
        f.name: f.default for f in fields if isinstance(f.default, (str, int, float)) and f.default != ""
    }
    shown = dict(list(shown.items())[:3])
    entry = f"{name}: {{{', '.join(f'{k}: {_yaml(v)}' for k, v in shown.items())}}}" if shown else name
    call = f"{cls.__name__}({', '.join(f'{key}={value!r}' for key, value in shown.items())})"
    known = {r.example: [step.name for step in load_recipe(r.example)] for r in recipes().values()}
    using = sorted((r for r, steps in known.items() if name in steps), key=lambda r: len(known[r]))
    lines = ["\nIn a recipe, mine.yaml:", "    passes:", f"    - {entry}", "On the command line:"]
    lines += [f"    rolora diff MODEL --recipe {recipe}" for recipe in [*using[:1], "mine.yaml"]]
    place = "rolora_passes" if PASSES.origin(name) is None else cls.__module__
    lines += ["In Python:", f"    from {place} import {cls.__name__}"]
    lines += [f"    graph = apply_passes(graph, [{call}])"]
    screen.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclasses.dataclass(frozen=True)
class Explained:
    """What a docstring says of an option."""

    meaning: str
    unit: str = ""


def explained(cls: type[Pass]) -> dict[str, Explained]:
    """What the docstrings of a pass say of its options, after what those of its base classes say of theirs.

    An entry of a section "Options" is `name: meaning`, `name (unit): meaning`, or begins with several names.
    """
    from rolora_passes.passes.base import Pass

    found: dict[str, Explained] = {}
    for each in reversed(cls.__mro__[: cls.__mro__.index(Pass)]):
        section = re.search(
            r"^Options.*?:\n((?: {4}.*\n?|\n)+)", inspect.cleandoc(each.__doc__ or ""), re.MULTILINE
        )
        for names, unit, meaning in _entries(section[1].splitlines() if section else []):
            for name in names:
                before = found.get(name, Explained(""))
                found[name] = Explained(f"{before.meaning} {meaning}".strip(), unit or before.unit)
    return found


def _entries(lines: Iterable[str]) -> Iterator[tuple[list[str], str, str]]:
    """(names, unit, meaning) of every entry of a section."""
    entries: list[tuple[list[str], str, list[str]]] = []
    for line in lines:
        if start := _OPTION.match(line):
            entries.append((start["names"].split(", "), start["unit"] or "", [line[start.end() :]]))
        elif entries:
            entries[-1][2].append(line.strip())
    return ((names, unit, " ".join(meaning).strip()) for names, unit, meaning in entries)


def _options(cls: type[Pass], known: Mapping[str, Explained]) -> Table:
    """A row for each option of a pass."""
    hints = get_type_hints(cls)
    table = _table("option", "type", "default", "unit", "meaning")
    for field in dataclasses.fields(cls):
        about = known.get(field.name, Explained(""))
        default = field.default if field.default is not dataclasses.MISSING else "required"
        words = type_words(hints[field.name]), str(default), about.unit, about.meaning
        table.add_row(field.name, *map(escape, words))
    return table


def type_words(hint: Any) -> str:
    """A type as a recipe's author thinks of it: `integer or none`."""
    origin = get_origin(hint)
    if origin is Literal:
        return ", ".join(map(str, get_args(hint)))
    if origin in (Union, UnionType):
        return " or ".join(map(type_words, get_args(hint)))
    words = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true or false",
        NoneType: "none",
        tuple: "list",
    }
    return words.get(origin or hint) or {Path: "path", Any: "any"}.get(hint) or "mapping"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0], overflow="fold")
    return table
