"""A sensitivity table from beginning to end: what `rolora sensitivity` does and shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from rolora_passes.errors import EvaluationError
from rolora_passes.evaluation.perplexity import split_windows
from rolora_passes.evaluation.scorers import GraphScorer, open_scorer
from rolora_passes.evaluation.sensitivity import sensitivity, split_recipe
from rolora_passes.loading.data import load_text, token_stream
from rolora_passes.loading.tokens import beginning
from rolora_passes.passes.base import Calibration
from rolora_passes.passes.manager import apply_passes, require_calibration
from rolora_passes.recipes import load_recipe


def rank_sites(
    source: str | Path,
    recipe: str | Path,
    text: str,
    window: int = 512,
    windows: int = 1,
    *,
    seed: int | None = None,
    calibration: Callable[[Any], Calibration] | None = None,
    verify: bool = True,
    tokenizer: str | Path | None = None,
    on_stage: Callable[[str], None] = lambda name: None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    on_pass: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Apply what a recipe does before it quantizes, then rank sites by what its quantizers cost each.

    Args:
        source, seed, calibration, tokenizer, verify: as `open_scorer` takes them.
        text, window, windows: the tokens that sites are compared on; see `split_windows`.

    Returns: JSON: `sites`, the costliest first, each with `name`, `kl` and `nll`; see `SiteLoss`.

    Raises:
        EvaluationError: a compiled folder, in which nothing can be changed.
        Also what `open_scorer`, `apply_passes` and `sensitivity` raise.
    """
    texts = load_text(text)
    before, quantizers = split_recipe(load_recipe(recipe, seed))
    if calibration is None:
        require_calibration(before, None)
    scorer, words = open_scorer(source, tokenizer=tokenizer, on_stage=on_stage)
    if not isinstance(scorer, GraphScorer):
        raise EvaluationError(f"expected a model or a saved graph, found a compiled folder at {source}")
    rows = split_windows(scorer, token_stream(texts, words), window, windows, beginning(words))
    on_stage("passes")
    given = calibration(words) if calibration and any(p.needs_calibration for p in before) else None
    graph = apply_passes(scorer.graph, before, verify=verify, calibration=given, on_pass=on_pass)
    on_stage("sites")
    found = sensitivity(graph, quantizers, rows, lambda done, total: on_progress("sites", done, total))
    return {
        "source": Path(source).name,
        "recipe": Path(recipe).name,
        "quantizers": [{step.name: step.options()} for step in quantizers],
        "text": Path(text).name,
        "window": window,
        "windows": len(rows),
        "seed": seed,
        "sites": [asdict(site) for site in found],
    }


def ranking_table(result: Mapping[str, Any], top: int) -> Table:
    """The costliest sites, and what all of them cost together if losses add up."""
    sites = result["sites"]
    total = sum(site["kl"] for site in sites)
    table = Table(
        title=escape(f"{result['source']}, {result['recipe']}: each site quantized alone"),
        caption=f"{len(sites)} sites, sum of KL {total:.4f} nats a token; "
        f"{result['windows']} windows of {result['window']} of {escape(result['text'])}",
        title_justify="left",
    )
    for column in ("site", "KL, nats", "part", "loss grows by"):
        table.add_column(column, justify="left" if column == "site" else "right", overflow="fold")
    for site in sites[:top]:
        part = f"{site['kl'] / total:.1%}" if total else ""
        table.add_row(escape(site["name"]), f"{site['kl']:.2e}", part, f"{site['nll']:+.2e}")
    return table
