"""What `rolora learn` and `rolora tune` share: options of the training pass, and the closing message."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rolora_passes.cli.display import Display, console, pass_line
from rolora_passes.cli.options import MODEL, pass_options
from rolora_passes.cli.parser import assignment

if TYPE_CHECKING:
    from rolora_passes.passes.manager import Record


def training_options(parser: argparse.ArgumentParser) -> None:
    """The model, the folder to write, and changes to the training pass."""
    parser.add_argument("model", help=MODEL)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", type=_assignment,
        help="change an option of the training pass, such as steps=50; may be repeated",
    )  # fmt: skip
    pass_options(parser)


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    name, value = assignment(text)
    return name, yaml.safe_load(value)


_assignment.words = "NAME=VALUE"  # type: ignore[attr-defined]


def training_arguments(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """The arguments of `learn_rotations` and `tune_adapter` that `training_options` sets."""
    from rolora_passes.learning import processes

    return {
        "changes": dict(options.set),
        "seed": options.seed,
        "verify": not options.no_verify,
        "on_stage": display.stage,
        "on_pass": pass_line if processes.rank() == 0 else None,
    }


def tell(record: Record, folder: Path, trained: str, more: str) -> None:
    """Say what was trained, at what cost, and what to do next; only the first process does."""
    from rolora_passes.learning import processes
    from rolora_passes.recipes import load_recipe

    if processes.rank():
        return
    notes, recipe = record.report.notes, folder / "recipe.yaml"
    data = " --calibration TEXT" if any(p.needs_calibration for p in load_recipe(recipe)) else ""
    losses, minutes = notes["losses"], notes["seconds"] / 60
    line = (
        f"{folder}: {len(record.report.changed)} {trained}, {len(losses)} steps in {minutes:.1f} min, "
        f"loss {losses[0]:.4g} -> {losses[-1]:.4g}, peak {notes['peak_mb']:.0f} MB, {more}\n"
        f"now: rolora compile MODEL --recipe {recipe}{data}"
    )
    console.print(line, markup=False, soft_wrap=True)
