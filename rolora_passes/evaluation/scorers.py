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
from rolora_passes.extras import require
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.dtypes import convert
from rolora_passes.graphs.graph import run
from rolora_passes.graphs.info import info
from rolora_passes.graphs.inputs import require_decoder
from rolora_passes.graphs.serialize import load_graph
from rolora_passes.loading.models import load_model
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.manager import Record, apply_passes, check_order, require_calibration
from rolora_passes.recipes import load_recipe


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
        source: a model folder, hub name or `.gguf` file, which is captured; a saved graph (`.safetensors`);
            or a folder that `rolora compile` wrote.
        recipe: passes to apply to a model or graph first, by name or file.
        calibration: makes, with the tokenizer, what passes that look at data are given.
        seed: for the passes of the recipe that draw at random; None leaves them their own.
        tokenizer: where the tokenizer is; a saved graph has none of its own.
        dtype: the precision a model or graph computes in; None is float32 for a model, and what it was
            saved in for a graph.
        target: which program of a compiled folder; None is the first it has.
        verify: check the exact passes of the recipe.
        ready: called with the model as it was loaded and its tokenizer, before any pass runs: the place to
            refuse what cannot be evaluated.
        on_stage, on_pass: called as the work goes on, for progress.
        printing: what `apply_passes` is to print and to keep of failures: its arguments by name.

    Raises:
        EvaluationError: a recipe or precision for a compiled folder, a target for another; no tokenizer.
        Also what `load_model`, `load_graph`, `load_recipe`, `capture` and `apply_passes` raise.
    """
    path, stage = Path(source).expanduser(), on_stage or (lambda name: None)
    passes = load_passes(recipe, seed)
    if (path / "manifest.json").is_file():
        if recipe is not None or dtype is not None:
            option = "--recipe" if recipe is not None else "--dtype"
            raise EvaluationError(f"{source} is compiled, and evaluated as it is: leave {option} out")
        stage("loading")
        scorer, words = ProgramScorer(path, target), load_tokenizer(tokenizer or path)
        if ready:
            ready(scorer, words)
        return scorer, words
    if target is not None:
        raise EvaluationError(f"{source} is not compiled, so it has no program: leave --target out")
    if calibration is None:
        require_calibration(passes, None)
    graph, words = _open_graph(str(source), path, passes, tokenizer, dtype, stage)
    if ready:
        ready(GraphScorer(graph), words)
    if passes:
        stage("passes")
        given = calibration(words) if calibration and any(p.needs_calibration for p in passes) else None
        graph = apply_passes(graph, passes, verify=verify, calibration=given, on_pass=on_pass, **printing)
    return GraphScorer(graph), words


def load_passes(recipe: str | Path | None, seed: int | None) -> list[Pass]:
    """The passes of a recipe; none without one."""
    if recipe is None:
        return []
    return load_recipe(recipe) if seed is None else load_recipe(recipe, seed)


def _open_graph(
    source: str,
    path: Path,
    passes: list[Pass],
    tokenizer: str | Path | None,
    dtype: torch.dtype | None,
    stage: Callable[[str], None],
) -> tuple[fx.GraphModule, Any]:
    if path.suffix == ".pte":
        raise EvaluationError(f"expected the folder that `rolora compile` wrote, found a program, {source}")
    if path.suffix == ".safetensors":
        if tokenizer is None:
            raise EvaluationError(f"a saved graph has no tokenizer: give --tokenizer FOLDER with {source}")
        stage("loading")
        words, graph = load_tokenizer(tokenizer), load_graph(path)
        return (graph if dtype is None else convert(graph, dtype)), words
    check_order(passes, ["canonical"])
    other = None if tokenizer is None else load_tokenizer(tokenizer)
    stage("loading")
    model, words = load_model(source, dtype or torch.float32)
    stage("capturing")
    return capture(model), other or words


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        EvaluationError: there is none that transformers can load.
    """
    transformers = require("transformers", "transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever transformers raises
        raise EvaluationError(f"cannot load a tokenizer from {folder}: {one_line(error)}") from error


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
