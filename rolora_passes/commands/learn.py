"""`rolora learn`: rotations trained under a recipe's quantizers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rolora_passes.commands.options import calibration_of, recipe_options
from rolora_passes.display import Display, console, pass_line


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "learn", help="train a recipe's rotations; alone, or under torchrun -m rolora_passes learn …"
    )
    parser.add_argument("model", help="model folder, hub name, or .gguf file")
    parser.add_argument("--recipe", required=True, help="spinquant:W4A4KV4, or a .yaml with learn-rotation")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", type=assignment,
        help="an option of learn-rotation, in place of the recipe's: steps=50",
    )  # fmt: skip
    recipe_options(parser)
    parser.set_defaults(run=run)


def assignment(text: str) -> tuple[str, Any]:
    """An argparse type: an option and its value, as YAML has it."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected OPTION=VALUE, found {text!r}")
    return name, yaml.safe_load(value)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.errors import PassError
    from rolora_passes.learning import processes
    from rolora_passes.learning.running import learn_rotations
    from rolora_passes.recipes import load_recipe

    processes.join()
    with Display() as display:
        calibration = calibration_of(options, display)
        if calibration is None:
            raise PassError("learn-rotation looks at data: give --calibration TEXT (.txt or .jsonl)")
        record = learn_rotations(
            options.model,
            options.recipe,
            options.output,
            calibration,
            changes=dict(options.set),
            seed=options.seed,
            verify=not options.no_verify,
            on_stage=display.stage,
            on_pass=pass_line if processes.rank() == 0 else None,
        )
    if processes.rank() == 0:
        notes, recipe = record.report.notes, options.output / "recipe.yaml"
        data = " --calibration TEXT" if any(p.needs_calibration for p in load_recipe(recipe)) else ""
        losses, minutes = notes["losses"], notes["seconds"] / 60
        line = (
            f"{options.output}: {len(record.report.changed)} matrices and scales, {len(losses)} steps in "
            f"{minutes:.1f} min, loss {losses[0]:.4g} -> {losses[-1]:.4g}, peak {notes['peak_mb']:.0f} MB, "
            f"|RᵀR - 1| <= {notes['orthogonality_error']:.0e}\n"
            f"now: rolora compile MODEL --recipe {recipe}{data}"
        )
        console.print(line, markup=False, soft_wrap=True)
