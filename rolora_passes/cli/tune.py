"""`rolora tune`: trains a recipe's LoRA branches and writes them as a PEFT adapter."""

from __future__ import annotations

import argparse
from typing import Any

from rolora_passes.cli.display import Display
from rolora_passes.cli.options import calibration_of, recipe_option
from rolora_passes.cli.parser import at_least
from rolora_passes.cli.training import tell, training_arguments, training_options

ORDER = 30
SUMMARY = "train a recipe's LoRA branches and write a PEFT adapter, in one process or under torchrun"
EXAMPLES = ("rolora tune MODEL --recipe rolora:W4A4 --data alpaca.jsonl --epochs 3 --set batch=8 -o tuned",)


def add(parser: argparse.ArgumentParser) -> None:
    recipe_option(parser, "with add-lora, and tune-lora or rilq", default="rolora:W4A4")
    parser.add_argument(
        "--data", metavar="FILE",
        help="instructions to train on: .jsonl, Alpaca's or conversations (default: the calibration text)",
    )  # fmt: skip
    parser.add_argument(
        "--window",
        type=at_least(2, int),
        default=1024,
        metavar="TOKENS",
        help="tokens in a window of instructions",
    )
    parser.add_argument(
        "--epochs", type=at_least(0.0, float), metavar="N",
        help="passes over the data (default: as many steps as the recipe says)",
    )  # fmt: skip
    training_options(parser)


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
