"""`rolora compile`: a model in, a folder that a stock runtime serves out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rolora_passes.commands.options import at_least, calibration_of, recipe_options
from rolora_passes.display import Display, pass_line, print_summary


def add(commands: Any) -> None:
    parser = commands.add_parser("compile", help="model in, .pte and report out")
    parser.add_argument("model", help="model folder, hub name, or .gguf file")
    parser.add_argument("--recipe", default="rotated-8da4w", help="recipe name or .yaml (%(default)s)")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--max-length", type=at_least(16, int), default=512, help="tokens of context (%(default)s)"
    )
    parser.add_argument(
        "--fast-prefill", action="store_true", help="attend in XNNPACK in calls from position 0"
    )
    recipe_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.export.compile import compile_model

    with Display() as display:
        compiled = compile_model(
            options.model,
            options.recipe,
            options.output,
            max_length=options.max_length,
            fast_prefill=options.fast_prefill,
            verify=not options.no_verify,
            calibration=calibration_of(options, display),
            seed=options.seed,
            on_stage=display.stage,
            on_pass=pass_line,
        )
    print_summary(compiled)
