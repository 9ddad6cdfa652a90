"""Recipes: pipelines as YAML, by name or from a file, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePath
from typing import Any

import yaml

from rolora_passes.errors import PassError, nearest
from rolora_passes.passes.base import Pass
from rolora_passes.passes.registry import make_pass
from rolora_passes.recipes.methods import METHODS


@dataclass(frozen=True)
class Recipe:
    """A pipeline by name.

    Attributes:
        about: a sentence or two.
        make: its passes; of one that takes a setting, at that.
        takes_setting: whether it is a pipeline at every setting (`quarot:W4A4KV4`).
    """

    name: str
    about: str
    make: Callable[[str], list[Pass]]
    takes_setting: bool = False

    @property
    def example(self) -> str:
        """The name as it is given to commands."""
        return f"{self.name}:W4A4KV4" if self.takes_setting else self.name


def recipes() -> dict[str, Recipe]:
    """Every recipe by name: the files of `recipes/files`, and the methods of papers, which take a setting."""
    folder = resources.files("rolora_passes.recipes") / "files"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda file: file.name)
    found = [_of_file(f.name.removesuffix(".yaml"), f.read_text("utf-8")) for f in files]
    found += [Recipe(name, known.about, known.passes, True) for name, known in METHODS.items()]
    return {recipe.name: recipe for recipe in found}


def _of_file(name: str, text: str) -> Recipe:
    """A recipe of ours, whose comment says what it is."""
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    return Recipe(name, comment, lambda setting: _parsed(text, name))


def recipe_names() -> list[str]:
    """The recipes that take no setting."""
    return [name for name, recipe in recipes().items() if not recipe.takes_setting]


def load_recipe(source: str | Path, seed: int | None = None) -> list[Pass]:
    """The passes of a recipe: by name ("8da4w"), by name and setting ("quarot:W4A4KV4"), or a YAML file.

    A recipe is a mapping with `passes`, an ordered list of names or one-entry mappings of name to options.

    Args:
        seed: for every pass that draws at random, in place of the recipe's.

    Raises:
        PassError: no such recipe or file, not YAML of that form, a setting that is none, or for a recipe that
            takes none, or a pass or option that does not exist.
    """
    passes = _loaded(source)
    if seed is None:
        return passes
    return [dataclasses.replace(p, seed=seed) if hasattr(p, "seed") else p for p in passes]  # type: ignore[call-arg]


def _loaded(source: str | Path) -> list[Pass]:
    path, (name, colon, setting) = Path(source), str(source).partition(":")
    known = recipes()
    if name in known:
        if colon and not known[name].takes_setting:
            raise PassError(f"expected no setting for the recipe {name}, found {setting!r}")
        return known[name].make(setting)
    if path.suffix not in (".yaml", ".yml"):
        there = ", ".join(recipe.example for recipe in known.values())
        near = nearest(name, known)
        raise PassError(f"expected a recipe file (.yaml) or one of {there}, found {str(source)!r}{near}")
    if not path.is_file():
        raise PassError(f"expected a recipe at {path}, found nothing")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PassError(f"recipe {path} is not a text file: {error}") from error
    return _beside(_parsed(text, source), path.parent)


def _parsed(text: str, source: str | Path) -> list[Pass]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PassError(f"recipe {source} is not YAML: {error}") from error
    passes = found.get("passes") if isinstance(found, dict) else found
    if not isinstance(found, dict) or not isinstance(passes, list):
        where = "passes: " if isinstance(found, dict) else ""
        raise PassError(f"expected a recipe {{passes: [...]}} in {source}, found {where}{str(passes)[:60]}")
    return [make_pass(entry) for entry in passes]


def settled(passes: Iterable[Pass], file: str) -> list[Pass]:
    """The passes that do again what these did, with a file of what was learned, or given to them.

    learn-rotation is left out; its results, and matrices that were given, are taken from the file.
    """
    steps = list(passes)
    learned = any(step.name == "learn-rotation" for step in steps)
    return [
        dataclasses.replace(step, given=file) if _takes(step, learned) else step  # type: ignore[call-arg]
        for step in steps
        if step.name != "learn-rotation"
    ]


def _takes(step: Pass, learned: bool) -> bool:
    """Whether a pass takes what a file holds."""
    can = any(field.name == "given" for field in dataclasses.fields(step)) and getattr(step, "factors", True)
    return can and (learned or "given" in step.options())


def _beside(passes: list[Pass], folder: Path) -> list[Pass]:
    """What a recipe names is looked for beside the recipe first: the two are moved together."""

    def found(step: Pass) -> dict[str, Any]:
        named = {key: value for key, value in step.options().items() if key in ("given", "adapter")}
        return {k: folder / v for k, v in named.items() if isinstance(v, str) and (folder / v).exists()}

    return [dataclasses.replace(step, **found(step)) for step in passes]


def dump_recipe(passes: Iterable[Pass], **about: Any) -> str:
    """YAML that `load_recipe` reads back to equal passes; `about` is written above them."""
    entries = [{p.name: _plain(p.options())} if p.options() else p.name for p in passes]
    return str(yaml.safe_dump({**about, "passes": entries}, sort_keys=False))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, PurePath):
            value = value.as_posix()
        elif not isinstance(value, (str, int, float, bool, list, type(None))):
            kind = type(value).__name__
            raise PassError(f"a recipe cannot hold {key}, a {kind}: save it and give the file's path")
        plain[key] = value
    return plain
