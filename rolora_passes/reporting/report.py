"""A whole HTML report: what `rolora inspect --html` measures and writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from rolora_passes.debugging.opening import Subject
from rolora_passes.debugging.twins import with_float_twin
from rolora_passes.errors import DataError
from rolora_passes.graphs.facts import refuted
from rolora_passes.graphs.info import info
from rolora_passes.passes.base import Pass
from rolora_passes.passes.fuse_norm import FuseNorm
from rolora_passes.passes.manager import Record, apply_passes, history
from rolora_passes.recipes import dump_recipe
from rolora_passes.reporting.activations import activation_sites, describe, headline, measure, picture_rows
from rolora_passes.reporting.arrays import Arrays
from rolora_passes.reporting.errors import describe_errors
from rolora_passes.reporting.grids import activation_grids, weight_grids
from rolora_passes.reporting.page import plotting_library, write_page
from rolora_passes.reporting.structure import basis_map, passes_done, sizes
from rolora_passes.version import versions

_LEAST = 8  # tokens needed for meaningful figures
_SHOWN = 400  # characters of the text shown on the page

Stage = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def report_html(
    subject: Subject,
    path: str | Path,
    about: Mapping[str, Any],
    *,
    verify: bool = True,
    on_stage: Stage = lambda name: None,
    on_progress: Progress = lambda name, done, total: None,
    on_pass: Callable[[Record], None] | None = None,
) -> None:
    """Apply a recipe, measure its effects on a text, and write a report as one HTML file.

    Args:
        subject: as `open_subject` returns it, with one window of text.
        path: the file to write.
        about: what to show: "model", "recipe", "text", and "seed", a number or None.
        verify: check the exact passes.

    Raises:
        DataError: fewer than 8 tokens.
        MissingExtraError: the extra "report" is not installed; nothing has run yet.
        Also what `apply_passes` raises.
    """
    plotting_library()
    start, tokens = time.perf_counter(), subject.tokens
    if tokens.shape[1] < _LEAST:
        raise DataError(f"expected at least {_LEAST} tokens of text, found {tokens.shape[1]}")
    data, arrays = gather(
        subject.graph,
        subject.passes,
        tokens,
        on_stage=on_stage,
        on_progress=on_progress,
        calibration=subject.calibration,
        verify=verify,
        on_pass=on_pass,
    )
    data["about"] = {
        **about,
        "yaml": dump_recipe(subject.passes),
        "beginning": str(subject.tokenizer.decode(tokens[0]))[:_SHOWN],
        "tokens": tokens.shape[1],
        "versions": versions(),
        "seconds": time.perf_counter() - start,
    }
    write_page(data, arrays, path)


def gather(
    graph: fx.GraphModule,
    passes: Sequence[Pass],
    tokens: Tensor,
    *,
    on_stage: Stage = lambda name: None,
    on_progress: Progress = lambda name, done, total: None,
    **applying: Any,
) -> tuple[dict[str, Any], Arrays]:
    """Everything that a page shows except its origin: JSON, and the arrays that it refers to.

    Args:
        graph: before the recipe.
        passes: the recipe.
        tokens: int64 [1, S].
        applying: as `apply_passes` takes it: calibration, verify, on_pass.
    """
    arrays = Arrays()
    on_stage("passes")
    twin, quantized = _graphs(graph, passes, applying)
    on_stage("outliers")
    sites = _activations(graph, twin, tokens, arrays)
    data: dict[str, Any] = {
        "headline": headline(sites),
        "activations": sites,
        "pipeline": passes_done(history(quantized)),
        "errors": None,
        "weights": [],
        "quantizers": [],
    }
    if quantized is not twin:
        on_stage("errors")
        data["errors"] = describe_errors(
            quantized, twin, tokens, lambda done, total: on_progress("values", done, total)
        )
        on_stage("grids")
        data["weights"] = weight_grids(quantized, twin, arrays)
        data["quantizers"] = activation_grids(quantized, tokens, arrays)
    on_stage("bases")
    fused = refuted(graph, "norms fused") is None
    plain = graph if fused else apply_passes(graph, [FuseNorm()], verify=False)
    return data | {
        "bases": basis_map(plain, info(twin).rotations),
        "sizes": sizes(quantized),
    }, arrays


def _graphs(
    graph: fx.GraphModule, passes: Sequence[Pass], applying: dict[str, Any]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(the float twin, the recipe's graph); the same graph twice if the recipe quantizes nothing."""
    if any(step.kind == "lossy" for step in passes):
        return with_float_twin(graph, passes, **applying)
    exact = apply_passes(graph, passes, **applying)
    return exact, exact


def _activations(
    graph: fx.GraphModule, twin: fx.GraphModule, tokens: Tensor, arrays: Arrays
) -> list[dict[str, Any]]:
    moved = any(record.report.modified for record in history(twin)[len(history(graph)) :])
    pictures = len(activation_sites(graph)) * (1 + moved)
    rows = picture_rows(pictures, tokens.shape[1])
    return describe(measure(graph, tokens, rows), measure(twin, tokens, rows) if moved else {}, arrays)
