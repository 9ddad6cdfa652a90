"""What the debugging commands start from: a model as a graph, a recipe, and tokens of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from rolora_passes.errors import EvaluationError
from rolora_passes.evaluation.perplexity import split_windows
from rolora_passes.evaluation.scorers import GraphScorer, open_scorer
from rolora_passes.loading.data import load_text, token_stream
from rolora_passes.loading.tokens import beginning
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.manager import check_order, require_calibration
from rolora_passes.recipes import load_recipe


@dataclass(frozen=True)
class Subject:
    """What is debugged.

    Attributes:
        graph: before the recipe.
        passes: the recipe's; none without one.
        tokens: int64 [N, S], the first windows of the text.
        calibration: for passes that look at data, where there are any.
        tokenizer: the model's, to show tokens by.
    """

    graph: fx.GraphModule
    passes: list[Pass]
    tokens: Tensor
    calibration: Calibration | None
    tokenizer: Any


def open_subject(
    source: str | Path,
    recipe: str | Path | None,
    text: str,
    window: int,
    windows: int,
    *,
    seed: int | None = None,
    calibration: Callable[[Any], Calibration] | None = None,
    tokenizer: str | Path | None = None,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Subject:
    """Load a model or a saved graph, a recipe and a text; what can be checked is checked before the model.

    Args:
        source, seed, calibration, tokenizer: as `open_scorer` takes them.
        recipe: its name or file; None for no passes.
        text, window, windows: the first windows of a text; see `split_windows`.

    Raises:
        EvaluationError: a compiled folder, which has no values to look at.
        Also what `load_text`, `load_recipe` and `open_scorer` raise.
    """
    if (Path(source).expanduser() / "manifest.json").is_file():
        raise EvaluationError(f"expected a model or a saved graph, found a compiled folder at {source}")
    texts = load_text(text)
    passes = [] if recipe is None else load_recipe(recipe, seed)
    if Path(source).suffix != ".safetensors":
        check_order(passes, ["canonical"])
    if calibration is None:
        require_calibration(passes, None)
    scorer, words = open_scorer(source, tokenizer=tokenizer, on_stage=on_stage)
    assert isinstance(scorer, GraphScorer)
    tokens = split_windows(scorer, token_stream(texts, words), window, windows, beginning(words))
    needed = calibration is not None and any(step.needs_calibration for step in passes)
    return Subject(
        scorer.graph, passes, tokens, calibration(words) if needed and calibration else None, words
    )
