"""`rolora track`: where a quantized model departs from its float twin."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from rolora_passes.cli.display import Display, pass_line
from rolora_passes.cli.options import at_least, open_from, recipe_options, subject_options, write_result


def add(commands: Any) -> None:
    parser = commands.add_parser("track", help="the error of every linear, sum and attention of a recipe")
    subject_options(parser)
    parser.add_argument("--below", type=float, default=10, metavar="DB", help="first below (%(default)s)")
    parser.add_argument("--top", type=at_least(1, int), default=20, help="rows to print (%(default)s)")
    recipe_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.debugging import track_errors, with_float_twin
    from rolora_passes.debugging.tables import trace_table

    with Display() as display:
        subject = open_from(options, display)
        display.stage("passes")
        twin, quantized = with_float_twin(
            subject.graph,
            subject.passes,
            calibration=subject.calibration,
            verify=not options.no_verify,
            on_pass=pass_line,
        )
        display.stage("tracking")
        trace = track_errors(
            quantized, twin, subject.tokens, lambda done, total: display.count("values", done, total)
        )
    Console().print(trace_table(trace, options.top, options.below, lambda t: subject.tokenizer.decode([t])))
    write_result(options, trace.row())
