"""`rolora tune`: a recipe's low-rank branches trained, and written as an adapter that PEFT reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rolora_passes.commands.learn import assignment
from rolora_passes.commands.options import at_least, calibration_of, recipe_options
from rolora_passes.display import Display, console, pass_line


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "tune", help="train a recipe's LoRA branches; alone, or under torchrun -m rolora_passes tune …"
    )
    parser.add_argument("model", help="model folder, hub name, or .gguf file")
    parser.add_argument(
        "--recipe",
        default="rolora:W4A4",
        help="rolora:W4A4, or a .yaml with add-lora and tune-lora (%(default)s)",
    )
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--data", help="instructions to train on, .jsonl in Alpaca's format; else the calibration text"
    )
    parser.add_argument(
        "--window", type=at_least(2, int), default=1024, help="tokens of their windows (%(default)s)"
    )
    parser.add_argument(
        "--epochs", type=at_least(0.0, float), help="over them, in place of the recipe's steps"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", type=assignment,
        help="an option of the pass that trains, in place of the recipe's: lr=0.0003",
    )  # fmt: skip
    recipe_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.errors import PassError
    from rolora_passes.instructions import instruction_windows
    from rolora_passes.learning import processes
    from rolora_passes.learning.running import tune_adapter
    from rolora_passes.passes import Calibration
    from rolora_passes.recipes import load_recipe

    processes.join()
    with Display() as display:
        calibration = calibration_of(options, display)

        def instructions(tokenizer: Any) -> Calibration:
            tokens, labels = instruction_windows(options.data, tokenizer, options.window, options.seed or 0)
            return Calibration(tokens, options.work, display.count, labels=labels)

        data = calibration if options.data is None else instructions
        if data is None:
            raise PassError("training looks at data: give --data INSTRUCTIONS.jsonl, or --calibration TEXT")
        record = tune_adapter(
            options.model,
            options.recipe,
            options.output,
            data,
            calibration,
            epochs=options.epochs,
            changes=dict(options.set),
            seed=options.seed,
            verify=not options.no_verify,
            on_stage=display.stage,
            on_pass=pass_line if processes.rank() == 0 else None,
        )
    if processes.rank() == 0:
        notes, recipe = record.report.notes, options.output / "recipe.yaml"
        text = " --calibration TEXT" if any(p.needs_calibration for p in load_recipe(recipe)) else ""
        losses, minutes = notes["losses"], notes["seconds"] / 60
        held = dict(notes.get("validation", [])).get(notes.get("best"))
        kept = "" if held is None else f", held out {held:.4g} at step {notes['best']}, which is kept"
        line = (
            f"{options.output}: {len(record.report.changed)} branches, {len(losses)} steps in "
            f"{minutes:.1f} min, loss {losses[0]:.4g} -> {losses[-1]:.4g}{kept}, "
            f"peak {notes['peak_mb']:.0f} MB\n"
            f"now: rolora compile MODEL --recipe {recipe}{text}"
        )
        console.print(line, markup=False, soft_wrap=True)
