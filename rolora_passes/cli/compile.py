"""`rolora compile`: turns a model into a folder that stock runtimes can serve."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rolora_passes.cli.display import Display, console, pass_line, print_summary
from rolora_passes.cli.options import (
    MODEL,
    calibration_of,
    pass_options,
    print_options,
    printing_of,
    recipe_option,
)
from rolora_passes.cli.parser import assignment, at_least

if TYPE_CHECKING:
    from rolora_passes.export.order import Made
    from rolora_passes.export.target import Target


ORDER = 10
SUMMARY = "turn a model into programs for stock runtimes, with a report"
EXAMPLES = (
    "rolora compile MODEL --recipe rotated-8da4w -o COMPILED",
    "rolora compile MODEL --recipe rotated-gptq-8da4w --calibration c4.jsonl --target onnx -o COMPILED",
)


def add(parser: argparse.ArgumentParser) -> None:
    from rolora_passes.export.target import TARGETS

    parser.add_argument("model", help=MODEL)
    recipe_option(parser, default="rotated-8da4w")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--max-length",
        type=at_least(16, int),
        default=512,
        metavar="TOKENS",
        help="context that the programs hold",
    )
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS),
        help="what to lower to; may be repeated (default: executorch)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", action="append", default=[], type=assignment, metavar="NAME=FOLDER",
        help="add a PEFT adapter to the .pte as a method NAME beside forward; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--accept-loss",
        action="store_true",
        help="write the programs even if the quantized graph is far from the model",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare model, quantized graph and programs on text"
    )
    pass_options(parser)
    print_options(parser)
    parser.set_defaults(flags=[*_add_target_options(parser)])


def run(options: argparse.Namespace) -> None:
    from rolora_passes.debugging.quality import NOTED, require_likeness
    from rolora_passes.errors import LoweringError
    from rolora_passes.evaluation.parity import compare_programs
    from rolora_passes.export.compile import compile_model

    targets = _targets(options)
    adapters = dict(options.adapter)
    if len(adapters) < len(options.adapter):
        names = ", ".join(name for name, _ in options.adapter)
        raise LoweringError(f"expected adapters of different names, found {names}")
    warnings = list[str]()
    with Display() as display:

        def judge(made: Made) -> dict[str, Any]:
            tell = partial(display.count, "evaluations, at most")
            loss = require_likeness(made, options.accept_loss, on_stage=display.stage, on_progress=tell)
            if loss.part >= NOTED:
                warnings.append(f"the quantized graph is far from the model: {loss}")
            return loss.row()

        compiled = compile_model(
            options.model,
            options.recipe,
            options.output,
            targets=targets,
            max_length=options.max_length,
            adapters=adapters,
            verify=not options.no_verify,
            calibration=calibration_of(options, display),
            seed=options.seed,
            on_stage=display.stage,
            on_pass=pass_line,
            on_warning=_warn,
            printing=printing_of(options),
            run=not options.no_check,
            judge=None if options.no_check else judge,
            check=None if options.no_check else partial(compare_programs, on_progress=display.count),
        )
    print_summary(compiled)
    for warning in [*compiled.warnings, *warnings]:
        _warn(warning)


def _warn(warning: str) -> None:
    console.print("[bold yellow]warning:[/] ", end="")
    console.print(warning, markup=False, soft_wrap=True)


def _add_target_options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    """The options of all targets. Those of other packages have the target's name before theirs, as has one
    whose name is taken: what a flag means does not depend on what else is installed.

    Yields: the target, the option's name, and its flag.
    """
    from rolora_passes.export.target import TARGETS, loadable_targets

    for cls in loadable_targets():
        for field in dataclasses.fields(cls):
            plain = field.name.replace("_", "-")
            ours = [f"--{plain}"] if TARGETS.origin(cls.name) is None else []
            for flag in (*ours, f"--{cls.name}-{plain}"):
                with suppress(argparse.ArgumentError):
                    parser.add_argument(flag, dest=f"{cls.name}.{field.name}", **_described(cls, field))
                    yield cls.name, field.name, flag
                    break


def _described(cls: type[Target], field: dataclasses.Field[Any]) -> dict[str, Any]:
    """What argparse is to know of a target's option; one that is not given is not in the namespace."""
    default, choices = field.default, field.metadata.get("choices")
    shown: Any = "none" if default is None else "off" if default is False else default
    text = f"of {cls.name}: {field.metadata.get('help', '')}"
    text += "" if "(default: " in text else f" (default: {shown})"
    about = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if isinstance(default, bool):
        return about | {"action": argparse.BooleanOptionalAction if default else "store_true"}
    one = choices[0] if choices else default
    return about | {"choices": choices, "type": str if one is None else type(one)}


def _targets(options: argparse.Namespace) -> list[Target]:
    """The targets that are asked for, with their options; those of others are refused: they would do
    nothing."""
    from rolora_passes.errors import LoweringError
    from rolora_passes.export.target import make_target

    given: dict[str, dict[str, Any]] = {name: {} for name in options.target or ["executorch"]}
    for target, name, flag in options.flags:
        if (value := getattr(options, f"{target}.{name}", None)) is None:
            continue
        if target not in given:
            found = f"found {', '.join(given)}: add it, or leave {flag} out"
            raise LoweringError(f"expected --target {target} with {flag}, {found}")
        given[target][name] = value
    return [make_target(name, **known) for name, known in given.items()]
