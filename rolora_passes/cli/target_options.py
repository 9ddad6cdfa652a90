"""Targets on the command line: which, and with what options of their own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from rolora_passes.errors import LoweringError
from rolora_passes.export.target import TARGETS, Target, make_target, usable_targets


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add `--target`, and after all other options of a command those of every target."""
    names = tuple(TARGETS)
    parser.add_argument(
        "--target", action="append", choices=names, help="what to lower to; may be repeated (executorch)"
    )
    parser.set_defaults(flags=[*_add_options(parser)])


def _add_options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    """(target, option, flag) of every option; one whose name is taken has its target's name before it."""
    for cls in usable_targets():
        for field in dataclasses.fields(cls):
            plain = field.name.replace("_", "-")
            for flag in (f"--{plain}", f"--{cls.name}-{plain}"):
                with suppress(argparse.ArgumentError):
                    parser.add_argument(flag, dest=f"{cls.name}.{field.name}", **_described(cls, field))
                    yield cls.name, field.name, flag
                    break


def _described(cls: type[Target], field: dataclasses.Field[Any]) -> dict[str, Any]:
    """What argparse is to know of a target's option; one that is not given is not in the namespace."""
    default, choices = field.default, field.metadata.get("choices")
    shown = "" if default in (None, False) else f" ({default})"
    text = f"of {cls.name}: {field.metadata.get('help', '')}{shown}"
    about = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if isinstance(default, bool):
        return about | {"action": argparse.BooleanOptionalAction if default else "store_true"}
    one = choices[0] if choices else default
    return about | {"choices": choices, "type": str if one is None else type(one)}


def chosen_targets(options: argparse.Namespace) -> list[Target]:
    """The targets that are asked for, with their options; those of others are refused: they would do
    nothing."""
    given: dict[str, dict[str, Any]] = {name: {} for name in options.target or ["executorch"]}
    for target, name, flag in options.flags:
        if (value := getattr(options, f"{target}.{name}", None)) is None:
            continue
        if target not in given:
            found = f"found {', '.join(given)}: add it, or leave {flag} out"
            raise LoweringError(f"expected --target {target} with {flag}, {found}")
        given[target][name] = value
    return [make_target(name, **known) for name, known in given.items()]
