"""Options and values that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rolora_passes.cli.display import Display, console

if TYPE_CHECKING:
    from rolora_passes.debugging.opening import Subject
    from rolora_passes.passes.base import Calibration


def at_least(low: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type: a number that is not below `low`."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"expected {low} or more, found {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it where a text is no number
    return number


def assignment(text: str) -> tuple[str, str]:
    """NAME=VALUE, as argparse converts an argument."""
    name, _, value = text.partition("=")
    if not (name and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    return name, value


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


def subject_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """A model, a recipe and a text, for the commands that look for where accuracy is lost."""
    parser.add_argument("model", help="model folder, hub name, .gguf, or saved graph")
    parser.add_argument("--recipe", required=required, help="recipe name or .yaml")
    parser.add_argument("--text", required=True, help=".txt, .jsonl, or hub:NAME/CONFIG:SPLIT")
    parser.add_argument(
        "--window", type=at_least(2, int), default=512, help="tokens of a window (%(default)s)"
    )
    parser.add_argument(
        "--windows", type=at_least(1, int), default=1, help="the first N windows (%(default)s)"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of a saved graph, which has none")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write all figures as JSON")


def open_from(options: argparse.Namespace, display: Display) -> Subject:
    """What `subject_options` name."""
    from rolora_passes.debugging.opening import open_subject

    return open_subject(
        options.model,
        options.recipe,
        options.text,
        options.window,
        options.windows,
        seed=options.seed,
        calibration=calibration_of(options, display),
        tokenizer=options.tokenizer,
        on_stage=display.stage,
    )


def write_result(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what was found, and of what, where `-o` says."""
    from rolora_passes.evaluation.report import save_results
    from rolora_passes.version import versions

    if options.output is None:
        return
    about = {
        "source": Path(options.model).name,
        "recipe": None if options.recipe is None else Path(options.recipe).name,
        "text": Path(options.text).name,
        "window": options.window,
        "windows": options.windows,
        "seed": options.seed,
        "versions": versions(),
    }
    save_results(about | found, options.output)


def print_options(parser: argparse.ArgumentParser) -> None:
    """What is kept of the passes' graphs, and of a pass that fails."""
    parser.add_argument(
        "--print-graph", choices=("changed", "all", "failed"), default="never",
        help="the graph as text after passes that changed it, after all, or of one that fails",
    )  # fmt: skip
    parser.add_argument(
        "--print-to", type=Path, metavar="DIR", help="there, and what makes a failing pass fail again"
    )


def printing_of(options: argparse.Namespace) -> dict[str, Any]:
    """`apply_passes`'s arguments for `print_options`."""
    from rolora_passes.debugging.reproducer import reproducer_in

    tell = partial(console.print, markup=False, soft_wrap=True)
    folder = options.print_to
    return {
        "print_graph": options.print_graph,
        "print_to": folder,
        "on_failure": None if folder is None else reproducer_in(folder, tell),
    }


def calibration_of(options: argparse.Namespace, display: Display) -> Callable[[Any], Calibration] | None:
    """Makes, with the model's tokenizer, what passes that look at data are given."""
    if options.calibration is None:
        return None
    from rolora_passes.loading.data import conversations, load_text, random_windows, token_stream
    from rolora_passes.loading.tokens import beginning
    from rolora_passes.passes.base import Calibration

    load_text(options.calibration, conversations())  # what is wrong with it is said before a model is loaded

    def make(tokenizer: Any) -> Calibration:
        stream = token_stream(load_text(options.calibration, conversations(tokenizer)), tokenizer)
        tokens = random_windows(
            stream,
            options.samples,
            options.length,
            options.seed or 0,
            options.calibration,
            beginning(tokenizer),
        )
        return Calibration(tokens, options.work, display.count)

    return make
