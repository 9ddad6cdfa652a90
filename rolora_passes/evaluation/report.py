"""A whole evaluation: what `rolora eval` measures, shows and writes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from rolora_passes.errors import DataError, EvaluationError
from rolora_passes.evaluation.perplexity import PROTOCOL, perplexity, split_windows
from rolora_passes.evaluation.scorers import GraphScorer, ProgramScorer, Scorer, open_scorer
from rolora_passes.evaluation.tasks import COUNTS, evaluate_tasks, load_tasks, stderr_name
from rolora_passes.files import writing
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.loading.data import load_text, token_stream
from rolora_passes.loading.tokens import beginning
from rolora_passes.passes.base import Calibration
from rolora_passes.passes.manager import history
from rolora_passes.version import versions


@dataclass(frozen=True)
class Measures:
    """What to measure.

    Attributes:
        texts: sources for perplexity, as `load_text` takes them.
        window, windows: tokens in a window, and the number of windows; None for all.
        tasks, task_limit, shots: as `evaluate_tasks` takes them.
    """

    texts: Sequence[str] = ()
    window: int = 2048
    windows: int | None = None
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    shots: int | None = None


def evaluate(
    source: str | Path,
    measures: Measures,
    *,
    seed: int | None = None,
    on_stage: Callable[[str], None] = lambda name: None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    calibration: Callable[[Any], Calibration] | None = None,
    **opening: Any,
) -> dict[str, Any]:
    """Open a model, graph or compiled folder and measure it; the result can be written as JSON.

    Texts and tasks are loaded before the model, and checked against it before any pass runs.

    Args:
        source, calibration, opening: as `open_scorer` takes them.
        seed: for the tasks (None means 0) and the recipe's passes (None keeps theirs).
    """
    if not measures.texts and not measures.tasks:
        raise EvaluationError("expected something to measure, found neither --text nor --tasks")
    texts = {text: load_text(text) for text in measures.texts}
    tasks = None
    if measures.tasks:
        on_stage("loading tasks")
        tasks = load_tasks(measures.tasks, seed or 0, measures.shots)
    streams: dict[str, torch.Tensor] = {}
    given: dict[str, Any] = {}

    def calibrate(tokenizer: Any) -> Calibration:
        assert calibration is not None
        made = calibration(tokenizer)
        given["calibration"] = {"samples": made.tokens.shape[0], "length": made.tokens.shape[1]}
        return made

    def tokenize(scorer: Scorer, tokenizer: Any) -> None:
        for name, documents in texts.items():
            streams[name] = token_stream(documents, tokenizer)
            try:
                begin = beginning(tokenizer)
                split_windows(scorer, streams[name], measures.window, measures.windows, begin)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error

    start = time.perf_counter()
    maker = None if calibration is None else calibrate
    scorer, tokenizer = open_scorer(
        source, seed=seed, calibration=maker, ready=tokenize, on_stage=on_stage, **opening
    )
    result = _described(source, scorer, seed, opening) | given
    result["seconds"] = {"opening": round(time.perf_counter() - start, 2)}
    result |= _perplexities(scorer, streams, beginning(tokenizer), measures, on_stage, on_progress)
    if tasks is not None:
        on_stage("tasks")
        start = time.perf_counter()
        options = (measures.task_limit, seed or 0, measures.shots, on_progress)
        result["tasks"] = evaluate_tasks(scorer, tokenizer, tasks, *options)
        result["seconds"]["tasks"] = round(time.perf_counter() - start, 2)
    return result


def _described(
    source: str | Path, scorer: Scorer, seed: int | None, opening: Mapping[str, Any]
) -> dict[str, Any]:
    """What was evaluated, and with which versions."""
    graph = scorer.graph if isinstance(scorer, GraphScorer) else None
    recipe = opening.get("recipe")
    return {
        "source": Path(source).name,
        "kind": "program" if graph is None else "graph",
        "program": scorer.target.program if isinstance(scorer, ProgramScorer) else None,
        "recipe": None if recipe is None else Path(recipe).name,
        "passes": [] if graph is None else [record.row() for record in history(graph)],
        "dtype": None if graph is None else str(dtype_of(graph)).removeprefix("torch."),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _perplexities(
    scorer: Scorer,
    streams: Mapping[str, torch.Tensor],
    begin: Sequence[int],
    measures: Measures,
    on_stage: Callable[[str], None],
    on_progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    found = []
    for name, stream in streams.items():
        on_stage(f"perplexity of {_short(name)}")
        measured = perplexity(
            scorer,
            stream,
            measures.window,
            measures.windows,
            lambda done, total: on_progress("windows", done, total),
            begin,
        )
        finite = math.isfinite(measured.value)  # JSON has no infinity
        shown = (
            {"value": measured.value, "error": measured.error} if finite else {"value": None, "error": None}
        )
        found.append({"text": _short(name), **asdict(measured), **shown})
    return {"perplexity": found, "perplexity_protocol": PROTOCOL} if found else {}


def _short(source: str) -> str:
    return source if source.startswith("hub:") else Path(source).name


def results_table(result: Mapping[str, Any]) -> Table:
    """A row for each figure, with its standard error."""
    what = result["recipe"] or result["program"]
    recipe = f", {what}" if what else ""
    caption = (
        "±: standard error. Perplexity is token level." if "perplexity" in result else "±: standard error."
    )
    table = Table(title=escape(f"{result['source']}{recipe}"), caption=caption, title_justify="left")
    for column in ("measure", "value", "±", "of"):
        table.add_column(column, justify="right" if column in ("value", "±") else "left", overflow="fold")
    for row in result.get("perplexity", ()):
        what = f"{row['windows']} windows of {row['window']}, {row['seconds']:.0f} s"
        value = "too large" if row["value"] is None else f"{row['value']:.3f}"
        table.add_row(escape(f"perplexity, {row['text']}"), value, _number(row["error"]), what)
    tasks = result.get("tasks", {})
    for name, row in tasks.get("tasks", {}).items():
        what = f"{row['examples']} of {row['of']}, {row['shots']}-shot"
        _metric_rows(table, name, {k: v for k, v in row.items() if k not in COUNTS}, what)
    for name, row in tasks.get("groups", {}).items():
        _metric_rows(table, name, row, "group")
    for name, row in tasks.get("means", {}).items():
        _metric_rows(table, name, row, "mean of tasks")
    return table


def _metric_rows(table: Table, name: str, row: Mapping[str, Any], what: str) -> None:
    for metric, value in row.items():
        if value is not None and not metric.partition(",")[0].endswith("_stderr"):
            table.add_row(
                escape(f"{metric}, {name}"), f"{value:.4f}", _number(row.get(stderr_name(metric))), what
            )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value < 1 else f"{value:.2f}"


def save_results(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON; the file is complete or not there."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
