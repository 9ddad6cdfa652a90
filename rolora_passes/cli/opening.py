"""What `rolora inspect` and `rolora diff` look at: a graph, as it is and after every pass of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rolora_passes.cli.display import Display, pass_line
from rolora_passes.cli.options import calibration_of
from rolora_passes.errors import EvaluationError

if TYPE_CHECKING:
    from torch import fx


def is_compiled(source: str) -> bool:
    """Whether `rolora compile` wrote what is there."""
    return (Path(source).expanduser() / "manifest.json").is_file()


def open_graph(source: str, display: Display) -> tuple[fx.GraphModule, Any]:
    """A model, captured, and its tokenizer; or a saved graph, which has none.

    Raises:
        EvaluationError: a compiled folder or program, which has no graph.
        Also what `load_graph`, `load_model` and `capture` raise.
    """
    from rolora_passes.graphs.capture import capture
    from rolora_passes.graphs.serialize import load_graph
    from rolora_passes.loading.models import load_model

    path = Path(source).expanduser()
    if is_compiled(source) or path.suffix == ".pte":
        raise EvaluationError(f"expected a model or a saved graph, found a compiled program at {source}")
    display.stage("loading")
    if path.suffix == ".safetensors":
        return load_graph(path), None
    model, tokenizer = load_model(source)
    display.stage("capturing")
    return capture(model), tokenizer


def stages(options: argparse.Namespace, display: Display) -> Iterator[tuple[str, fx.GraphModule]]:
    """The graph of `options.model` as "given", then after every pass of `options.recipe`, by the pass's name.

    Raises:
        EvaluationError: calibration text for a saved graph without --tokenizer.
        Also what `load_recipe`, `open_graph` and `apply_passes` raise.
    """
    from rolora_passes.evaluation.scorers import load_passes, load_tokenizer
    from rolora_passes.graphs.facts import facts
    from rolora_passes.passes.manager import check_order, require_calibration, steps

    passes = load_passes(options.recipe, options.seed)
    make = calibration_of(options, display)
    if make is None:
        require_calibration(passes, None)
    graph, tokenizer = open_graph(options.model, display)
    check_order(passes, facts(graph))
    data = None
    if make is not None and any(step.needs_calibration for step in passes):
        if tokenizer is None and options.tokenizer is None:
            raise EvaluationError(
                f"a saved graph has no tokenizer: give --tokenizer FOLDER with {options.model}"
            )
        data = make(load_tokenizer(options.tokenizer) if options.tokenizer else tokenizer)
    yield "given", graph
    display.stage("passes")
    for applied in steps(graph, passes, calibration=data, verify=not options.no_verify):
        pass_line(applied.record)
        yield applied.step.name, applied.graph
