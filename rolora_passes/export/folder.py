"""A compiled folder: what its manifest says is there, how it was made, and of what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import fx

from rolora_passes.errors import EvaluationError, RunError
from rolora_passes.export.target import TARGETS, Target, loadable_targets, make_target
from rolora_passes.graphs.bases.rotations import save_rotations
from rolora_passes.graphs.info import info
from rolora_passes.passes.add_lora import AddLoRA
from rolora_passes.passes.base import Pass
from rolora_passes.recipes import dump_recipe, settled

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `rolora compile` says of a folder it wrote.

    Raises:
        RunError: no manifest there, or not one of ours.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RunError(
            f"expected a folder that `rolora compile` wrote, found no {MANIFEST} in {folder}"
        ) from error
    except ValueError as error:  # not JSON, or not text
        raise RunError(f"{path} is damaged: {error}; compile it again") from error
    if not isinstance(found, dict) or not isinstance(found.get("max_length"), int):
        raise RunError(f"expected a manifest with max_length in {path}, found none: compile it again")
    return found


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(about, indent=1), "utf-8")


def figures(lowered: Any) -> dict[str, Any]:
    """What a lowering tells of itself, for the manifest."""
    return {name: value for name, value in asdict(lowered).items() if name != "path"}


def find_target(folder: Path, name: str | None = None) -> Target:
    """The target whose program is in a compiled folder: the one of this name, or the first there is.

    Raises:
        EvaluationError: it was compiled for none that is known, or not for this one.
        RunError: not a compiled folder, or the program is gone.
    """
    there = list(read_manifest(folder).get("targets", {}))
    known = [each for each in there if each in TARGETS and name in (None, each)]
    if not known:
        raise EvaluationError(
            f"expected a program for {name or ' or '.join(TARGETS)} in {folder}, found "
            f"{' and '.join(there) or 'none'}: compile it with --target"
        )
    target = make_target(known[0])
    if not target.is_in(folder):
        raise RunError(f"expected {target.program} in {folder}, found none: compile it again")
    return target


def require_replaceable(folder: Path) -> None:
    """Refuse to write over anything but a compiled folder.

    Raises:
        FileExistsError: something else is there.
    """
    compiled = (folder / MANIFEST).is_file() and any(cls.is_in(folder) for cls in loadable_targets())
    if folder.exists() and not compiled and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not a compiled folder; choose another name")


def keep_inputs(
    folder: Path, graph: fx.GraphModule, passes: Sequence[Pass], adapters: Mapping[str, str | Path]
) -> None:
    """Put beside the programs what they were made of: the recipe, adapters, rotations."""
    for name, adapter in adapters.items():
        shutil.copytree(adapter, folder / "adapters" / name)
    kept = _with_adapters(settled(passes, "rotations.json"), folder)
    (folder / "recipe.yaml").write_text(dump_recipe(kept), "utf-8")
    if info(graph).rotations:
        save_rotations(graph, folder)


def _with_adapters(passes: Sequence[Pass], folder: Path) -> list[Pass]:
    """The passes, with adapters that they load copied to a folder: the recipe there goes with it."""
    found: list[Pass] = []
    for step in passes:
        if isinstance(step, AddLoRA) and step.adapter is not None:
            name = "adapter" if not (folder / "adapter").exists() else f"adapter-{len(found)}"
            shutil.copytree(step.adapter, folder / name)
            step = replace(step, adapter=name)
        found.append(step)
    return found
