"""What can be evaluated: anything that gives logits for tokens, a graph or a compiled program alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import DataError, EvaluationError, RunError, one_line
from rolora_passes.export.folder import find_target, read_manifest
from rolora_passes.graphs.info import info
from rolora_passes.graphs.inputs import require_decoder
from rolora_passes.graphs.running import run
from rolora_passes.moved import old_names
from rolora_passes.passes.base import Calibration
from rolora_passes.passes.manager import Record, apply_passes
from rolora_passes.recipes.opening import is_compiled, load_tokenizer, open_source


class Scorer(ABC):
    """Gives logits for tokens.

    Attributes:
        vocabulary: token ids are below this; None if unknown.
        max_length: the longest window it takes; None if unknown.
        batch_tokens: how many tokens the rows of a call may have together; 0 if it takes one row.
    """

    vocabulary: int | None = None
    max_length: int | None = None
    batch_tokens: int = 0

    @abstractmethod
    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Logits [B, S - start, V] after each of the tokens int64 [B, S] from `start` on; B is 1 without
        `batch_tokens`."""


class GraphScorer(Scorer):
    """A captured graph, in its own precision; the whole window in one call.

    Raises:
        GraphFormatError: it is not a decoder's.
    """

    batch_tokens = 1024  # logits of a vocabulary of 250 000 take 1 GB

    def __init__(self, graph: fx.GraphModule) -> None:
        require_decoder(graph, "the next token's likelihood")
        self.graph = graph
        config = info(graph).config
        self.vocabulary = config.get("vocab_size")
        self.max_length = config.get("max_position_embeddings")

    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        return run(self.graph, tokens)[:, start:]


class ProgramScorer(Scorer):
    """A program in a folder that `rolora compile` wrote, in its target's runtime, which keeps a cache.

    A program returns the last token's logits, as generation needs, so tokens from `start` on go through its
    cache one at a time, which is also how text is generated. Programs lowered with `last_token=False` take
    them in one call. Tokens a window has in common with the one before are in the cache already.

    Args:
        target: whose program; None: the first that is there.

    Raises:
        EvaluationError: the folder has no program that is known, or not this one.
        RunError: not such a folder, or the runtime refuses its program.
        MissingExtraError: the runtime is not installed.
    """

    def __init__(self, folder: str | Path, target: str | None = None) -> None:
        manifest = read_manifest(Path(folder))
        self.vocabulary = manifest.get("config", {}).get("vocab_size")
        self.max_length: int = manifest["max_length"]
        self.target = find_target(Path(folder), target)
        self._cached: list[int] = []
        probe = torch.zeros(1, min(2, self.max_length), dtype=torch.int64)
        try:
            self._score = self.target.score(Path(folder))
            self._all_positions = self._score(probe, 0).shape[1] > 1
        except (RunError, RuntimeError) as error:
            program = Path(folder) / self.target.program
            raise RunError(f"the runtime refuses {program}: {one_line(error)}; compile it again") from error

    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        require_window(self, tokens.shape[1])
        begin = min(_common(tokens[0].tolist(), self._cached), start)
        self._cached = []  # of no use if a call fails
        if self._all_positions:
            found = self._score(tokens[:, begin:], begin)[:, start - begin :]
        else:
            first = self._score(tokens[:, begin : start + 1], begin)
            found = first.new_empty(1, tokens.shape[1] - start, first.shape[-1])
            found[:, 0] = first[:, 0]
            for position in range(start + 1, tokens.shape[1]):
                found[:, position - start] = self._score(tokens[:, position : position + 1], position)[:, 0]
        self._cached = tokens[0].tolist()
        return found


def open_scorer(
    source: str | Path,
    *,
    recipe: str | Path | None = None,
    calibration: Callable[[Any], Calibration] | None = None,
    seed: int | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    target: str | None = None,
    verify: bool = True,
    ready: Callable[[Scorer, Any], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_pass: Callable[[Record], None] | None = None,
    printing: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Scorer, Any]:
    """A scorer for whatever is there, and its tokenizer.

    Args:
        source: as `open_source` takes it, or a folder that `rolora compile` wrote.
        recipe: passes to apply to a model or graph first.
        calibration, seed, tokenizer, dtype: as `open_source` takes them.
        target: which program of a compiled folder; None is the first it has.
        verify: check the exact passes of the recipe.
        ready: called with the model as it was loaded and its tokenizer, before any pass runs: the place to
            refuse what cannot be evaluated.
        on_stage, on_pass: called as the work goes on, for progress.
        printing: what `apply_passes` is to print and to keep of failures: its arguments by name.

    Raises:
        EvaluationError: a recipe or precision for a compiled folder, a target for another; no tokenizer.
        Also what `open_source` and `apply_passes` raise.
    """
    stage = on_stage or (lambda name: None)
    if is_compiled(source):
        if recipe is not None or dtype is not None:
            option = "--recipe" if recipe is not None else "--dtype"
            raise EvaluationError(f"{source} is compiled, and evaluated as it is: leave {option} out")
        stage("loading")
        scorer, words = ProgramScorer(Path(source).expanduser(), target), load_tokenizer(tokenizer or source)
        if ready:
            ready(scorer, words)
        return scorer, words
    if target is not None:
        raise EvaluationError(f"{source} is not compiled, so it has no program: leave --target out")
    if Path(source).suffix == ".pte":
        raise EvaluationError(f"expected the folder that `rolora compile` wrote, found a program, {source}")
    opened = open_source(
        source, recipe, seed=seed, calibration=calibration, tokenizer=tokenizer, dtype=dtype, on_stage=stage
    )
    graph = opened.graph
    if ready:
        ready(GraphScorer(graph), opened.tokenizer)
    if opened.passes:
        stage("passes")
        known: Any = {"verify": verify, "calibration": opened.calibration, "on_pass": on_pass, **printing}
        graph = apply_passes(graph, opened.passes, **known)
    return GraphScorer(graph), opened.tokenizer


def require_window(scorer: Scorer, window: int) -> None:
    """Refuse windows that are longer than what the model holds.

    Raises:
        EvaluationError: so it is.
    """
    if scorer.max_length is not None and window > scorer.max_length:
        raise EvaluationError(
            f"expected windows of at most {scorer.max_length} tokens, which is all the model holds, found "
            f"{window}: give --window {scorer.max_length}"
        )


def require_known(scorer: Scorer, tokens: Tensor) -> None:
    """Refuse tokens the model has no row for.

    Raises:
        DataError: there are some.
    """
    largest = int(tokens.max()) if tokens.numel() else 0
    if scorer.vocabulary is not None and largest >= scorer.vocabulary:
        raise DataError(
            f"expected tokens below {scorer.vocabulary}, the model's vocabulary, found {largest}: "
            "the tokenizer is of another model"
        )


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


old_names(globals())
