"""What every command starts from: a model as a graph, its tokenizer, a recipe's passes, calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from rolora_passes.errors import EvaluationError, one_line
from rolora_passes.extras import require
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.dtypes import convert
from rolora_passes.graphs.facts import facts
from rolora_passes.graphs.serialize import load_graph
from rolora_passes.loading.models import load_outlined
from rolora_passes.loading.models import load_tokenizer as load_model_tokenizer
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.manager import check_order, require_calibration
from rolora_passes.recipes.recipe import load_recipe

Recipe = str | Path | Sequence[Pass] | None
"""A recipe's name, method and setting, or file; passes; None for no passes."""
MakeCalibration = Callable[[Any], Calibration]
"""Makes calibration data, given the model's tokenizer."""


@dataclass(frozen=True)
class Opened:
    """A graph, and the recipe that is about to be applied to it.

    Attributes:
        graph: before the recipe.
        passes: the recipe's; empty without one.
        tokenizer: the model's, or the one asked for; None for a saved graph opened without.
        calibration: None if no pass looks at data and none were given.
    """

    graph: fx.GraphModule
    passes: list[Pass]
    tokenizer: Any
    calibration: Calibration | None


def open_source(
    source: str | Path,
    recipe: Recipe = None,
    *,
    seed: int | None = None,
    calibration: MakeCalibration | Calibration | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    with_tokenizer: bool = True,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Opened:
    """Load a model or a saved graph, and check a recipe against it.

    The recipe and the calibration text are checked before any weights are loaded.

    Args:
        source: a model folder, hub name or `.gguf` file, which is captured; or a saved graph.
        recipe: what will be applied to it; nothing is applied here.
        seed: replaces the seed of every pass in the recipe that has one; None keeps them.
        calibration: the data, or what makes it, which is called only if a pass needs any.
        tokenizer: where to find the tokenizer, in place of the model's; a saved graph has none of its own.
        dtype: compute in this type; None means float32 for a model, and the saved type for a graph.
        with_tokenizer: refuse a saved graph opened without a tokenizer even if no pass needs one.
        on_stage: called with "loading" and "capturing" as the work proceeds.

    Raises:
        EvaluationError: a compiled folder or program, which has no graph; a tokenizer that is needed and not
            given, or that cannot be loaded.
        Also what `checked_recipe`, `load_graph`, `load_model` and `capture` raise.
    """
    path = Path(source).expanduser()
    if is_compiled(path) or path.suffix == ".pte":
        found = "program" if path.is_file() else "folder"
        raise EvaluationError(f"expected a model or a saved graph, found a compiled {found} at {source}")
    saved = path.suffix == ".safetensors"
    passes = checked_recipe(recipe, seed, calibration, captured=not saved)
    needed = any(step.needs_calibration for step in passes)
    if saved and tokenizer is None and (needed or with_tokenizer):
        raise EvaluationError(f"a saved graph has no tokenizer: give --tokenizer FOLDER with {source}")
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    data = calibration if isinstance(calibration, Calibration) else None
    if callable(calibration) and needed:
        words = load_model_tokenizer(str(source)) if words is None else words
        data = calibration(words)
    on_stage("loading")
    if saved:
        graph = load_graph(path)
        check_order(passes, facts(graph, {f for step in passes for f in (*step.requires, *step.forbids)}))
        return Opened(graph if dtype is None else convert(graph, dtype), passes, words, data)
    model, own, weights = load_outlined(str(source), dtype or torch.float32)
    on_stage("capturing")
    return Opened(capture(model, weights=weights), passes, own if words is None else words, data)


def checked_recipe(
    recipe: Recipe, seed: int | None = None, calibration: object = None, *, captured: bool = True
) -> list[Pass]:
    """The passes of a recipe, checked as far as possible without a graph.

    Args:
        calibration: what passes that look at data will be given; None if there is none.
        captured: the recipe is for a graph fresh from `capture`, so the order of its passes can be checked.

    Raises:
        PassOrderError: a pass stands where its requirements cannot hold.
        PassError: a pass needs calibration data and there is none; also what `load_recipe` raises.
    """
    passes = load_passes(recipe, seed)
    if captured:
        check_order(passes, ["canonical"])
    if calibration is None:
        require_calibration(passes, None)
    return passes


def load_passes(recipe: Recipe, seed: int | None = None) -> list[Pass]:
    """The passes of a recipe, or passes as they are; none for None."""
    if recipe is None:
        return []
    return load_recipe(recipe, seed) if isinstance(recipe, (str, Path)) else list(recipe)


def is_compiled(source: str | Path) -> bool:
    """Whether a path is a folder that `rolora compile` wrote."""
    return (Path(source).expanduser() / "manifest.json").is_file()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a folder, with or without a model beside it.

    Raises:
        EvaluationError: there is none that transformers can load.
    """
    transformers = require("transformers", "transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever transformers raises
        raise EvaluationError(f"cannot load a tokenizer from {folder}: {one_line(error)}") from error
