"""How a command reads its options and explains them: one form of help for all."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_TYPES: dict[Any, str] = {int: "integer", float: "number", Path: "path", str: "text", None: "text"}


def add_command(commands: Any, name: str, summary: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A command's parser; its help shows the type and default of every option, and the examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=Help,
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="write a log for a bug report (default: none)"
    )
    return parser


class Help(argparse.RawDescriptionHelpFormatter):
    """Help in which every argument says its type, and its default or that it is required."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not isinstance(action, (argparse._StoreAction, argparse._StoreTrueAction, argparse._AppendAction)):
            return text  # that of `--help`, or a command in the list
        words, found, default = text.partition(" (default: ")
        notes = [] if action.choices or action.nargs == 0 else [_type(action)]
        if action.required or not (action.option_strings or action.nargs):
            notes.append("required")
        elif found:
            notes.append(f"default: {default.removesuffix(')')}")
        elif action.nargs == 0:
            notes.append("default: off")
        else:
            notes.append(f"default: {'none' if action.default in (None, []) else action.default}")
        return f"{words} ({'; '.join(notes)})".replace("%", "%%")


def _type(action: argparse.Action) -> str:
    kind = action.type
    return getattr(kind, "words", None) or _TYPES[kind]


def at_least(low: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type: a number that is not below `low`."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"expected {low} or more, found {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it where a text is no number
    number.words = f"{_TYPES[kind]} >= {low:g}"  # type: ignore[attr-defined]
    return number


def byte_size(text: str) -> int:
    """A number of bytes such as 8GB, 512MB or 1.5GiB, as argparse converts an argument."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 8GB, 512MB or 1.5GiB, found {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1))


byte_size.words = "size"  # type: ignore[attr-defined]


def assignment(text: str) -> tuple[str, str]:
    """NAME=VALUE, as argparse converts an argument."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    return name, value


assignment.words = "NAME=VALUE"  # type: ignore[attr-defined]
