"""Options and values that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rolora_passes.display import Display

if TYPE_CHECKING:
    from rolora_passes.passes import Calibration


def at_least(low: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type: a number that is not below `low`."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"expected {low} or more, found {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it where a text is no number
    return number


def recipe_options(parser: argparse.ArgumentParser) -> None:
    """What the passes of a recipe are given."""
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="for passes that look at data: .txt, .jsonl, or hub:NAME/CONFIG:SPLIT",
    )
    at_least_1 = at_least(1, int)
    parser.add_argument("--samples", type=at_least_1, default=128, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=at_least_1, default=2048, help="their tokens (%(default)s)")
    parser.add_argument(
        "--seed",
        type=at_least(0, int),
        help="of all that is drawn at random (0; a recipe's own in its passes)",
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep what passes have finished, to go on if interrupted"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not check the exact passes")


def calibration_of(options: argparse.Namespace, display: Display) -> Callable[[Any], Calibration] | None:
    """Makes, with the model's tokenizer, what passes that look at data are given."""
    if options.calibration is None:
        return None
    from rolora_passes.data import load_text, random_windows, token_stream
    from rolora_passes.passes import Calibration

    texts = load_text(options.calibration)

    def make(tokenizer: Any) -> Calibration:
        stream = token_stream(texts, tokenizer)
        tokens = random_windows(
            stream, options.samples, options.length, options.seed or 0, options.calibration
        )
        return Calibration(tokens, options.work, display.count)

    return make
