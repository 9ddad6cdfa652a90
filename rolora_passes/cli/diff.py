"""`rolora diff`: what is different between two graphs, or what every pass of a recipe does to one."""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

from rolora_passes.cli.display import Display
from rolora_passes.cli.opening import is_compiled, open_graph, stages
from rolora_passes.cli.options import recipe_options
from rolora_passes.errors import EvaluationError


def add(commands: Any) -> None:
    parser = commands.add_parser("diff", help="what is different between two graphs, or two compiled folders")
    parser.add_argument("model", help="model folder, hub name, .gguf, saved graph, or compiled folder")
    parser.add_argument("other", nargs="?", help="what it became; without it, give --recipe")
    parser.add_argument("--recipe", help="show what every pass of this does: recipe name or .yaml")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of a saved graph, which has none")
    recipe_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.inspection.diff import diff_text

    if (options.other is None) == (options.recipe is None):
        found = "neither" if options.other is None else "both"
        raise EvaluationError(
            f"expected another graph to compare {options.model} with, or a --recipe, found {found}"
        )
    if options.recipe is not None:
        with Display() as display:
            for (_, before), (name, after) in pairwise(stages(options, display)):
                print(f"== {name}\n{diff_text(before, after)}", flush=True)
    elif is_compiled(options.model) and is_compiled(options.other):
        from rolora_passes.reporting.artefact import artefact_diff

        print(artefact_diff(options.model, options.other), end="")
    else:
        with Display() as display:
            graphs = [open_graph(source, display)[0] for source in (options.model, options.other)]
        print(diff_text(*graphs), end="")
