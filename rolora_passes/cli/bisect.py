"""`rolora bisect`: which pass and which sites lose the most."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rolora_passes.cli.display import Display, pass_line
from rolora_passes.cli.options import at_least, open_from, recipe_options, subject_options, write_result
from rolora_passes.errors import PassError

if TYPE_CHECKING:
    from rolora_passes.debugging.bisect import PassLoss, SiteBisection
    from rolora_passes.debugging.opening import Subject


def add(commands: Any) -> None:
    parser = commands.add_parser("bisect", help="which pass and which sites lose the most")
    subject_options(parser, required=False)
    parser.add_argument(
        "--good", type=Path, metavar="GRAPH", help="compare the sites of MODEL, a saved graph, with this one"
    )
    parser.add_argument("--most", type=at_least(1, int), default=3, help="sites to find (%(default)s)")
    recipe_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.debugging.tables import passes_table, sites_table

    if (options.recipe is None) == (options.good is None):
        raise PassError("expected either --recipe, or --good with the saved graph to compare with")
    with Display() as display:
        subject = open_from(options, display)
        losses, found = (
            _between(options, subject, display) if options.good else _recipe(options, subject, display)
        )
    screen = Console()
    if losses:
        screen.print(passes_table(losses))
    if found is not None:
        screen.print(sites_table(found))
    sites = None if found is None else found.row()
    write_result(options, {"passes": [loss.row() for loss in losses], "sites": sites})


def _between(
    options: argparse.Namespace, subject: Subject, display: Display
) -> tuple[list[PassLoss], SiteBisection]:
    from rolora_passes.debugging.bisect import bisect_sites
    from rolora_passes.graphs import load_graph

    good = load_graph(options.good)
    display.stage("bisecting sites")
    tell = _progress(display)
    return [], bisect_sites(good, subject.graph, subject.tokens, most=options.most, on_progress=tell)


def _recipe(
    options: argparse.Namespace, subject: Subject, display: Display
) -> tuple[list[PassLoss], SiteBisection | None]:
    from rolora_passes.debugging.bisect import bisect_recipe

    return bisect_recipe(
        subject.graph,
        subject.passes,
        subject.tokens,
        most=options.most,
        calibration=subject.calibration,
        on_stage=display.stage,
        on_pass=pass_line,
        on_progress=_progress(display),
    )


def _progress(display: Display) -> Any:
    return lambda done, total: display.count("evaluations, at most", done, total)
