"""`rolora ablate`: what one site in floating point, or one Hadamard less, would change."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from rolora_passes.cli.display import Display, pass_line
from rolora_passes.cli.options import at_least, open_from, recipe_options, subject_options, write_result


def add(commands: Any) -> None:
    parser = commands.add_parser("ablate", help="what one site in float, or one Hadamard less, would change")
    subject_options(parser)
    parser.add_argument(
        "--leave", choices=("quantizers", "hadamards"), default="quantizers",
        help="what to leave out, one site at a time (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--top", type=at_least(1, int), default=20, help="rows to print (%(default)s)")
    recipe_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.debugging.counterfactuals import bare_recipe, sites_in_float, without_hadamards
    from rolora_passes.debugging.tables import changes_table
    from rolora_passes.debugging.twins import with_float_twin
    from rolora_passes.passes.manager import apply_passes

    with Display() as display:
        subject = open_from(options, display)
        display.stage("passes")
        given: dict[str, Any] = {
            "calibration": subject.calibration,
            "verify": not options.no_verify,
            "on_pass": pass_line,
        }
        twin, quantized = with_float_twin(subject.graph, subject.passes, **given)

        def tell(done: int, total: int) -> None:
            display.count("sites", done, total)

        if options.leave == "quantizers":
            title = "Each site alone in floating point"
            display.stage("sites")
            found = sites_in_float(twin, quantized, subject.tokens, tell)
        else:
            title = "Each online Hadamard alone left out, with its inverse"
            display.stage("passes without Hadamards")
            bare = apply_passes(subject.graph, bare_recipe(subject.passes), **given)
            display.stage("sites")
            found = without_hadamards(twin, quantized, bare, subject.tokens, tell)
    Console().print(changes_table(found, title, options.top))
    write_result(options, found.row() | {"left": options.leave})
