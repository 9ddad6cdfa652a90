"""`rolora compile`: turns a model into a folder that stock runtimes can serve."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
    from rolora_passes.export.compile import Made


ORDER = 10
SUMMARY = "turn a model into programs for stock runtimes, with a report"
EXAMPLES = (
    "rolora compile MODEL --recipe rotated-8da4w -o COMPILED",
    "rolora compile MODEL --recipe rotated-gptq-8da4w --calibration c4.jsonl --target onnx -o COMPILED",
)


def add(parser: argparse.ArgumentParser) -> None:
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
        "--target", action="append", choices=("executorch", "onnx"),
        help="what to lower to; may be repeated (default: executorch)",
    )  # fmt: skip
    parser.add_argument(
        "--flavor", choices=("ort", "portable"),
        help="of ONNX: with ONNX Runtime's own operators, or with standard operators only (default: ort)",
    )  # fmt: skip
    parser.add_argument(
        "--accuracy-level", type=int, choices=(0, 4),
        help="of ONNX's quantized linears: 4 computes in int8 (default: 4 if activations are quantized)",
    )  # fmt: skip
    parser.add_argument(
        "--fast-prefill", action="store_true", help="let XNNPACK compute attention in calls from position 0"
    )
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


def run(options: argparse.Namespace) -> None:
    from rolora_passes.debugging.quality import NOTED, require_likeness
    from rolora_passes.errors import LoweringError
    from rolora_passes.evaluation.parity import compare_programs
    from rolora_passes.export.compile import compile_model

    targets: Any = options.target or ("executorch",)
    _require_used(options, targets)
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
            flavor=options.flavor or "ort",
            accuracy_level=options.accuracy_level,
            fast_prefill=options.fast_prefill,
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


def _require_used(options: argparse.Namespace, targets: Sequence[str]) -> None:
    """Refuse options of targets that were not asked for, since they would do nothing."""
    from rolora_passes.errors import LoweringError

    given = {
        "--fast-prefill": ("executorch", options.fast_prefill),
        "--flavor": ("onnx", options.flavor is not None),
        "--accuracy-level": ("onnx", options.accuracy_level is not None),
    }
    for name, (target, there) in given.items():
        if there and target not in targets:
            raise LoweringError(
                f"expected --target {target} with {name}, found {', '.join(targets)}: add it, or leave "
                f"{name} out"
            )
