"""`rolora diagnose`: where a recipe loses accuracy, looked at in one of four ways."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rolora_passes.cli.display import Display, pass_line
from rolora_passes.cli.options import (
    GRAPH,
    applying,
    pass_options,
    recipe_option,
    subject_from,
    text_options,
)
from rolora_passes.cli.parser import at_least
from rolora_passes.errors import PassError

if TYPE_CHECKING:
    from rich.table import Table

    from rolora_passes.debugging.opening import Subject

    Found = tuple[Subject, list[Table], dict[str, Any]]

ORDER = 60
SUMMARY = "find what in a recipe loses accuracy"
EXAMPLES = (
    "rolora diagnose errors MODEL --recipe rotated-8da4w --text wikitext2.txt",
    "rolora diagnose bisect MODEL --recipe quarot-rtn:W4A4 --text wikitext2.txt --top 5",
    "rolora diagnose ablate MODEL --recipe rotated-8da4w --text wikitext2.txt --drop hadamards",
    "rolora diagnose sensitivity MODEL --recipe rtn:W4A4 --text wikitext2.txt -o sites.json",
)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", metavar="WHAT", choices=tuple(_WAYS),
        help="errors: how far every linear, attention and residual sum is from floating point; "
        "bisect: the pass, and the sites, that lose the most; "
        "ablate: what changes if one quantizer, or one online Hadamard, is dropped; "
        "sensitivity: what each linear loses if nothing else is quantized",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help=GRAPH)
    recipe_option(parser, "what to diagnose (required, but with --good)")
    text_options(parser)
    parser.add_argument(
        "--top",
        type=at_least(1, int),
        metavar="N",
        help="rows to print, or sites to find (default: 20; bisect: 3)",
    )
    parser.add_argument(
        "--below",
        type=float,
        metavar="DB",
        help="errors: name the first value with an SQNR below this (default: 10)",
    )
    parser.add_argument(
        "--good", type=Path, metavar="GRAPH",
        help="bisect: compare MODEL, a saved graph, with this one (default: its recipe in floating point)",
    )  # fmt: skip
    parser.add_argument(
        "--drop",
        choices=("quantizers", "hadamards"),
        help="ablate: what to drop, one at a time (default: quantizers)",
    )
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("--most", dest="top", type=at_least(1, int), **hidden)  # as `rolora bisect` had it
    parser.add_argument(
        "--leave", dest="drop", choices=("quantizers", "hadamards"), **hidden
    )  # `rolora ablate`
    pass_options(parser)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.evaluation.report import save_results
    from rolora_passes.version import versions

    _require_used(options)
    with Display() as display:
        subject, tables, found = _WAYS[options.what](options, display)
    for table in tables:
        Console().print(table)
    if options.output is None:
        return
    about = {
        "source": Path(options.model).name,
        "recipe": None if options.recipe is None else Path(options.recipe).name,
        "text": Path(options.text).name,
        "window": options.window,
        "windows": len(subject.tokens),
        "seed": options.seed,
        "versions": versions(),
    }
    save_results(about | found, options.output)


def _require_used(options: argparse.Namespace) -> None:
    """Refuse options of another diagnosis, which would do nothing, and ask for what this one needs."""
    for name, what in {"below": "errors", "good": "bisect", "drop": "ablate"}.items():
        if getattr(options, name) is not None and options.what != what:
            raise PassError(f"expected --{name} with `rolora diagnose {what}` only: leave it out")
    if (options.recipe is None) == (options.good is None):
        raise PassError("expected either --recipe, or --good with the saved graph to compare with")


def _errors(options: argparse.Namespace, display: Display) -> Found:
    from rolora_passes.debugging import track_errors, with_float_twin
    from rolora_passes.debugging.tables import trace_table

    subject = subject_from(options, display)
    display.stage("passes")
    twin, quantized = with_float_twin(subject.graph, subject.passes, **applying(options, subject))
    display.stage("tracking")
    trace = track_errors(quantized, twin, subject.tokens, partial(display.count, "values"))
    below = 10.0 if options.below is None else options.below
    table = trace_table(trace, options.top or _ROWS, below, lambda t: subject.tokenizer.decode([t]))
    return subject, [table], trace.row()


def _bisect(options: argparse.Namespace, display: Display) -> Found:
    from rolora_passes.debugging.bisect import bisect_recipe, bisect_sites
    from rolora_passes.debugging.tables import passes_table, sites_table
    from rolora_passes.graphs import load_graph

    subject = subject_from(options, display)
    how: dict[str, Any] = {
        "most": options.top or 3,
        "on_progress": partial(display.count, "evaluations, at most"),
    }
    if options.good is not None:
        good = load_graph(options.good)
        display.stage("bisecting sites")
        sites = bisect_sites(good, subject.graph, subject.tokens, **how)
        return subject, [sites_table(sites)], {"passes": [], "sites": sites.row()}
    how |= {"calibration": subject.calibration, "on_stage": display.stage, "on_pass": pass_line}
    losses, found = bisect_recipe(subject.graph, subject.passes, subject.tokens, **how)
    tables = [passes_table(losses), *([] if found is None else [sites_table(found)])]
    rows = {"passes": [loss.row() for loss in losses], "sites": None if found is None else found.row()}
    return subject, tables, rows


def _ablate(options: argparse.Namespace, display: Display) -> Found:
    from rolora_passes.debugging import with_float_twin
    from rolora_passes.debugging.counterfactuals import bare_recipe, sites_in_float, without_hadamards
    from rolora_passes.debugging.tables import changes_table
    from rolora_passes.passes.manager import apply_passes

    subject = subject_from(options, display)
    display.stage("passes")
    how = applying(options, subject)
    twin, quantized = with_float_twin(subject.graph, subject.passes, **how)
    tell = partial(display.count, "sites")
    drop = options.drop or "quantizers"
    if drop == "quantizers":
        title = "Each site alone in floating point"
        display.stage("sites")
        found = sites_in_float(twin, quantized, subject.tokens, tell)
    else:
        title = "Each online Hadamard alone left out, with its inverse"
        display.stage("passes without Hadamards")
        bare = apply_passes(subject.graph, bare_recipe(subject.passes), **how)
        display.stage("sites")
        found = without_hadamards(twin, quantized, bare, subject.tokens, tell)
    return subject, [changes_table(found, title, options.top or _ROWS)], found.row() | {"left": drop}


def _sensitivity(options: argparse.Namespace, display: Display) -> Found:
    from rolora_passes.debugging.tables import sensitivity_table
    from rolora_passes.evaluation.sensitivity import sensitivity, split_recipe
    from rolora_passes.passes.manager import apply_passes
    from rolora_passes.recipes import load_recipe

    before, quantizers = split_recipe(load_recipe(options.recipe, options.seed))
    subject = subject_from(options, display, before)
    display.stage("passes")
    graph = apply_passes(subject.graph, before, **applying(options, subject))
    display.stage("sites")
    found = sensitivity(graph, quantizers, subject.tokens, partial(display.count, "sites"))
    rows = {
        "quantizers": [{step.name: step.options()} for step in quantizers],
        "sites": [dataclasses.asdict(site) for site in found],
    }
    return subject, [sensitivity_table(found, options.top or _ROWS)], rows


_WAYS = {"errors": _errors, "bisect": _bisect, "ablate": _ablate, "sensitivity": _sensitivity}
_ROWS = 20
