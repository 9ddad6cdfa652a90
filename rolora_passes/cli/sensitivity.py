"""`rolora sensitivity`: which linears lose the most when quantized alone."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from rolora_passes.cli.display import Display, pass_line
from rolora_passes.cli.options import at_least, calibration_of, recipe_options, subject_options


def add(commands: Any) -> None:
    parser = commands.add_parser("sensitivity", help="which linears lose the most when quantized alone")
    subject_options(parser)
    parser.add_argument("--top", type=at_least(1, int), default=20, help="rows to print (%(default)s)")
    recipe_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.evaluation.ranking import rank_sites, ranking_table
    from rolora_passes.evaluation.report import save_results

    with Display() as display:
        result = rank_sites(
            options.model,
            options.recipe,
            options.text,
            options.window,
            options.windows,
            seed=options.seed,
            calibration=calibration_of(options, display),
            tokenizer=options.tokenizer,
            verify=not options.no_verify,
            on_stage=display.stage,
            on_progress=display.count,
            on_pass=pass_line,
        )
    Console().print(ranking_table(result, options.top))
    if options.output is not None:
        save_results(result, options.output)
