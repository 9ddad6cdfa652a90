"""`rolora tune`: a recipe's low-rank branches trained, and written as an adapter that PEFT reads."""

from __future__ import annotations

import argparse
from typing import Any

from rolora_passes.cli.display import Display
from rolora_passes.cli.options import at_least, calibration_of
from rolora_passes.cli.training import tell, training_arguments, training_options


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "tune", help="train a recipe's LoRA branches; alone, or under torchrun -m rolora_passes tune …"
    )
    parser.add_argument(
        "--recipe",
        default="rolora:W4A4",
        help="rolora:W4A4, or a .yaml with add-lora and tune-lora (%(default)s)",
    )
    parser.add_argument(
        "--data", help="instructions to train on, .jsonl in Alpaca's format; else the calibration text"
    )
    parser.add_argument(
        "--window", type=at_least(2, int), default=1024, help="tokens of their windows (%(default)s)"
    )
    parser.add_argument(
        "--epochs", type=at_least(0.0, float), help="over them, in place of the recipe's steps"
    )
    training_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.errors import PassError
    from rolora_passes.learning import processes
    from rolora_passes.loading.instructions import instruction_windows
    from rolora_passes.passes.base import Calibration
    from rolora_passes.recipes.learned import tune_adapter

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
            **training_arguments(options, display),
        )
    notes = record.report.notes
    held = dict(notes.get("validation", [])).get(notes.get("best"))
    kept = (
        "nothing held out" if held is None else f"held out {held:.4g} at step {notes['best']}, which is kept"
    )
    tell(record, options.output, "branches", kept)
