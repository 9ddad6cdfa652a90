"""What the diagnoses start from: a model and a recipe, and tokens of a text to compare predictions on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rolora_passes.evaluation.perplexity import split_windows
from rolora_passes.evaluation.scorers import GraphScorer
from rolora_passes.loading.data import load_text, token_stream
from rolora_passes.loading.tokens import beginning
from rolora_passes.recipes.opening import Opened, Recipe, open_source


@dataclass(frozen=True)
class Subject(Opened):
    """An opened model, and the text that its predictions are compared on.

    Attributes:
        tokens: int64 [N, S], the first windows of the text.
    """

    tokens: Tensor


def open_subject(
    source: str | Path, recipe: Recipe, text: str, window: int, windows: int, **opening: Any
) -> Subject:
    """Open a model or a saved graph, a recipe and a text; the text is read before the model.

    Args:
        source, recipe, opening: as `open_source` takes them.
        text, window, windows: the first windows of a text; see `split_windows`.

    Raises:
        GraphFormatError: the graph is not a decoder's.
        Also what `load_text`, `open_source` and `split_windows` raise.
    """
    texts = load_text(text)
    opened = open_source(source, recipe, **opening)
    stream, begin = token_stream(texts, opened.tokenizer), beginning(opened.tokenizer)
    tokens = split_windows(GraphScorer(opened.graph), stream, window, windows, begin)
    return Subject(**vars(opened), tokens=tokens)
