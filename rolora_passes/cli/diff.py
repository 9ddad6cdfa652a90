"""`rolora diff`: how two graphs differ, or what every pass of a recipe changes."""

from __future__ import annotations

import argparse
from typing import Any

from rolora_passes.cli.display import Display, pass_line
from rolora_passes.cli.options import (
    ANY,
    opened_from,
    pass_options,
    recipe_option,
    tokenizer_option,
)
from rolora_passes.errors import EvaluationError

ORDER = 80
SUMMARY = "show how two graphs, or two compiled folders, differ, or what every pass of a recipe changes"
EXAMPLES = (
    "rolora diff MODEL --recipe rotated-8da4w",
    "rolora diff before.safetensors after.safetensors",
)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=ANY)
    parser.add_argument(
        "other", nargs="?", help="what to compare it with (default: what --recipe makes of it)"
    )
    recipe_option(parser, "show what every pass of this changes")
    tokenizer_option(parser)
    pass_options(parser)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.inspection.diff import diff_text
    from rolora_passes.recipes.opening import is_compiled, open_source

    if (options.other is None) == (options.recipe is None):
        found = "neither" if options.other is None else "both"
        raise EvaluationError(
            f"expected another graph to compare {options.model} with, or a --recipe, found {found}"
        )
    if options.recipe is not None:
        with Display() as display:
            _diff_passes(options, display)
    elif is_compiled(options.model) and is_compiled(options.other):
        from rolora_passes.reporting.artefact import artefact_diff

        print(artefact_diff(options.model, options.other), end="")
    else:
        with Display() as display:
            how: dict[str, Any] = {"with_tokenizer": False, "on_stage": display.stage}
            graphs = [open_source(source, **how).graph for source in (options.model, options.other)]
        print(diff_text(*graphs), end="")


def _diff_passes(options: argparse.Namespace, display: Display) -> None:
    """Print what every pass changes, as soon as it is done."""
    from rolora_passes.inspection.diff import diff_text
    from rolora_passes.passes.manager import steps

    opened = opened_from(options, display)
    display.stage("passes")
    before = opened.graph
    verify, calibration = not options.no_verify, opened.calibration
    for applied in steps(before, opened.passes, verify=verify, calibration=calibration):
        pass_line(applied.record)
        print(f"== {applied.step.name}\n{diff_text(before, applied.graph)}", flush=True)
        before = applied.graph
