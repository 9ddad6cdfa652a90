"""`rolora inspect`: the structure of a model, a saved graph or a compiled folder."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rolora_passes.cli.display import Display, console, pass_line
from rolora_passes.cli.options import (
    ANY,
    TEXT,
    applying,
    opened_from,
    pass_options,
    recipe_option,
    subject_from,
    tokenizer_option,
)
from rolora_passes.cli.parser import at_least
from rolora_passes.errors import EvaluationError

if TYPE_CHECKING:
    from torch import fx

ORDER = 70
SUMMARY = "show the structure of a model, a saved graph or a compiled folder"
EXAMPLES = (
    "rolora inspect MODEL --recipe rotated-8da4w",
    "rolora inspect MODEL --bases",
    "rolora inspect MODEL --recipe quarot-rtn:W4A4KV4 --text wikitext2.txt --html report.html",
)
_VIEWERS = (".json", ".onnx")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=ANY)
    recipe_option(parser, "apply this first")
    parser.add_argument(
        "--bases",
        action="store_true",
        help="also show which axes can rotate together, and what blocks the rest",
    )
    parser.add_argument("--graph", action="store_true", help="also show the graph, one line per node")
    parser.add_argument(
        "--as-captured", action="store_true", help="show a model as captured, without fuse-norm"
    )
    parser.add_argument(
        "--view",
        type=Path,
        metavar="FILE",
        help="write the graph for Model Explorer (.json) or Netron (.onnx)",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a report as one HTML page; needs --recipe and --text"
    )
    parser.add_argument(
        "--text",
        help=f"with --view, colour values by their SQNR on this text; with --html, measure on it: {TEXT}",
    )
    parser.add_argument(
        "--window",
        type=at_least(2, int),
        metavar="TOKENS",
        help="how much of it (default: 512; with --html 128)",
    )
    tokenizer_option(parser)
    pass_options(parser)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.graphs.text import graph_text
    from rolora_passes.inspection.structure import structure_text
    from rolora_passes.inspection.summary import bases_text, summary
    from rolora_passes.recipes.opening import is_compiled

    if options.view is not None and options.view.suffix not in _VIEWERS:
        raise EvaluationError(f"--view: expected a file ending in .json or .onnx, found {options.view}")
    if is_compiled(options.model):
        _compiled(options)
        return
    if options.html is not None:
        _write_html(options)
        return
    with Display() as display:
        graph, sqnr = _opened(options, display)
    print(summary(graph) + "\n" + structure_text(graph), end="")
    if options.bases:
        print("\n" + bases_text(graph), end="")
    if options.graph:
        print("\n" + graph_text(graph), end="")
    if options.view is not None:
        _write_view(graph, options.view, sqnr)


def _compiled(options: argparse.Namespace) -> None:
    from rolora_passes.reporting.artefact import artefact_text

    asked = [n for n in ("recipe", "bases", "graph", "as_captured", "view", "html") if getattr(options, n)]
    if asked:
        raise EvaluationError(
            f"{options.model} is compiled and has no graph: leave --{asked[0].replace('_', '-')} out, "
            "or give the model that it was compiled from"
        )
    print(artefact_text(Path(options.model).expanduser()), end="")


def _opened(options: argparse.Namespace, display: Display) -> tuple[fx.GraphModule, dict[str, float] | None]:
    """The graph to show, and the SQNR of its values by node if there is a text to measure it on."""
    from rolora_passes.graphs.facts import facts
    from rolora_passes.passes.fuse_norm import FuseNorm
    from rolora_passes.passes.manager import apply_passes

    if options.text is not None:
        return _measured(options, display)
    opened = opened_from(options, display)
    graph = opened.graph
    if opened.passes:
        display.stage("passes")
        graph = apply_passes(graph, opened.passes, **applying(options, opened))
    elif not options.as_captured and not facts(graph, ("norms fused", *FuseNorm.forbids)):
        graph = apply_passes(graph, [FuseNorm()], verify=False)
    return graph, None


def _measured(options: argparse.Namespace, display: Display) -> tuple[fx.GraphModule, dict[str, float]]:
    from rolora_passes.debugging import track_errors, with_float_twin

    if options.recipe is None or options.view is None:
        raise EvaluationError("--text is what SQNR is measured on: give --recipe and --view with it")
    options.window, options.windows = options.window or 512, 1
    subject = subject_from(options, display)
    display.stage("passes")
    twin, graph = with_float_twin(subject.graph, subject.passes, **applying(options, subject))
    display.stage("tracking")
    trace = track_errors(graph, twin, subject.tokens, partial(display.count, "values"))
    return graph, {node.name: node.sqnr for node in trace.nodes if math.isfinite(node.sqnr)}


def _write_view(graph: fx.GraphModule, path: Path, sqnr: dict[str, float] | None) -> None:
    """Write a graph for a viewer, and say how to open it."""
    if path.suffix == ".onnx":
        from rolora_passes.reporting.netron import write_netron

        write_netron(graph, path, sqnr)
        how = f"netron {path}"
    else:
        from rolora_passes.reporting.model_explorer import write_model_explorer

        first, *others = write_model_explorer(graph, path, sqnr)
        how = f"model-explorer {first} --node_data_paths={','.join(map(str, others))}"
    console.print(f"open it with: {how}", markup=False, soft_wrap=True)


def _write_html(options: argparse.Namespace) -> None:
    """Write the report, and say where it is."""
    from rolora_passes.reporting.page import plotting_library
    from rolora_passes.reporting.report import report_html

    if options.recipe is None or options.text is None:
        raise EvaluationError(
            "--html shows the effects of a recipe on a text: give --recipe and --text with it"
        )
    beside = [name for name in ("bases", "graph", "as_captured", "view") if getattr(options, name)]
    if beside:
        raise EvaluationError(
            f"--html writes nothing but the report: leave --{beside[0].replace('_', '-')} out"
        )
    plotting_library()  # refused before the model is loaded
    options.window, options.windows = options.window or 128, 1
    about = {
        "model": Path(options.model).name,
        "recipe": Path(options.recipe).name,
        "text": Path(options.text).name,
        "seed": options.seed,
    }
    with Display() as display:
        subject = subject_from(options, display)
        report_html(
            subject,
            options.html,
            about,
            verify=not options.no_verify,
            on_stage=display.stage,
            on_progress=display.count,
            on_pass=pass_line,
        )
    console.print(f"open it in a browser: {options.html}", markup=False, soft_wrap=True)
