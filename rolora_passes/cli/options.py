"""Options that several commands share, and what they name."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rolora_passes.cli.display import Display, console, pass_line
from rolora_passes.cli.parser import at_least, byte_size

if TYPE_CHECKING:
    from rolora_passes.debugging.opening import Subject
    from rolora_passes.passes.base import Calibration, Pass
    from rolora_passes.recipes.opening import Opened, Recipe

MODEL = "model folder, hub name, or .gguf file"
GRAPH = "model folder, hub name, .gguf file, or saved graph (.safetensors)"
ANY = "model folder, hub name, .gguf file, saved graph (.safetensors), or compiled folder"
TEXT = ".txt or .jsonl file, or hub:NAME/CONFIG:SPLIT"


def recipe_option(parser: argparse.ArgumentParser, words: str = "passes to apply", **how: Any) -> None:
    """`--recipe`."""
    parser.add_argument("--recipe", help=f"{words}: a recipe's name, METHOD:SETTING, or .yaml file", **how)


def device_option(parser: argparse.ArgumentParser) -> None:
    """`--device`, which `main` heeds: a command that has it runs within `computing_on`."""
    parser.add_argument(
        "--device",
        metavar="NAME",
        default="cpu",
        help="compute on cpu, cuda, cuda:1, mps, or auto, the best there is; weights travel there as needed",
    )


def tokenizer_option(parser: argparse.ArgumentParser) -> None:
    """`--tokenizer`, for saved graphs."""
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="where the tokenizer is; a saved graph has none (default: the model's)",
    )  # fmt: skip


def pass_options(parser: argparse.ArgumentParser) -> None:
    """What the passes of a recipe are given."""
    parser.add_argument("--calibration", metavar="TEXT", help=f"for passes that look at data: {TEXT}")
    parser.add_argument(
        "--samples", type=at_least(1, int), default=128, metavar="N", help="calibration windows to draw"
    )
    parser.add_argument(
        "--length", type=at_least(1, int), default=2048, metavar="TOKENS", help="tokens in each of them"
    )
    parser.add_argument(
        "--seed",
        type=at_least(0, int),
        metavar="N",
        help="of everything drawn at random (default: the recipe's in its passes, else 0)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        help="keep finished parts of passes there, and resume from them",
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the check of exact passes")
    memory_options(parser)
    device_option(parser)


def memory_options(parser: argparse.ArgumentParser) -> None:
    """How much memory a command may take, and where the rest goes."""
    parser.add_argument(
        "--memory", type=byte_size, metavar="SIZE",
        help="bound of what the process takes, such as 8GB; values that do not fit go to the spill folder "
        "(default: what the machine has)",
    )  # fmt: skip
    parser.add_argument(
        "--spill", type=Path, metavar="FOLDER",
        help="where weights that passes make lie meanwhile; on a disk, not in memory (default: beside the "
        "output, or the system's folder for temporary files)",
    )  # fmt: skip
    parser.add_argument(
        "--spill-limit", type=byte_size, metavar="SIZE",
        help="bound of what lies there at once, such as 40GB (default: what the disk holds)",
    )  # fmt: skip


def spilling_to(options: argparse.Namespace) -> AbstractContextManager[Any]:
    """Within it, passes keep to `memory_options`, if a command has them."""
    if "memory" not in options:
        return nullcontext()
    from rolora_passes.ondisk import spilling

    output = getattr(options, "output", None)
    beside = Path(tempfile.gettempdir()) if output is None else Path(output).absolute().parent
    return spilling(options.spill or beside, options.spill_limit, options.memory)


def text_options(parser: argparse.ArgumentParser) -> None:
    """A text to measure on, and where to write the figures."""
    parser.add_argument("--text", required=True, help=f"text to measure on: {TEXT}")
    parser.add_argument(
        "--window", type=at_least(2, int), default=512, metavar="TOKENS", help="tokens in a window"
    )
    parser.add_argument(
        "--windows", type=at_least(1, int), default=1, metavar="N", help="windows, from the start of the text"
    )
    tokenizer_option(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write all figures as JSON")


def print_options(parser: argparse.ArgumentParser) -> None:
    """What is kept of the passes' graphs, and of a pass that fails."""
    parser.add_argument(
        "--print-graph", choices=("changed", "all", "failed"), default="never",
        help="print the graph after every pass that changed it, after all, or of one that fails",
    )  # fmt: skip
    parser.add_argument(
        "--print-to", type=Path, metavar="FOLDER",
        help="write these graphs there, and a reproducer if a pass fails (default: standard error)",
    )  # fmt: skip


def printing_of(options: argparse.Namespace) -> dict[str, Any]:
    """`apply_passes`'s arguments for `print_options`.

    Raises:
        OSError: --print-to is no folder that can be written to.
    """
    from rolora_passes.debugging.reproducer import reproducer_in

    folder = options.print_to
    if folder is not None:
        require_writable(folder)
    tell = partial(console.print, markup=False, soft_wrap=True)
    return {
        "print_graph": options.print_graph,
        "print_to": folder,
        "on_failure": None if folder is None else reproducer_in(folder, tell),
    }


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        OSError: so it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"expected a folder to write graphs to, found no permission to write to {folder}"
        )


def opened_from(options: argparse.Namespace, display: Display, with_tokenizer: bool = False) -> Opened:
    """The model, recipe and calibration data that options name."""
    from rolora_passes.recipes.opening import open_source

    return open_source(
        options.model,
        options.recipe,
        seed=options.seed,
        calibration=calibration_of(options, display),
        tokenizer=options.tokenizer,
        with_tokenizer=with_tokenizer,
        on_stage=display.stage,
    )


def subject_from(
    options: argparse.Namespace, display: Display, passes: Sequence[Pass] | None = None
) -> Subject:
    """What `text_options` name too; `passes` replace the recipe."""
    from rolora_passes.debugging.opening import open_subject

    recipe: Recipe = options.recipe if passes is None else passes
    return open_subject(
        options.model,
        recipe,
        options.text,
        options.window,
        options.windows,
        seed=options.seed,
        calibration=calibration_of(options, display, passes),
        tokenizer=options.tokenizer,
        on_stage=display.stage,
    )


def applying(options: argparse.Namespace, opened: Opened) -> dict[str, Any]:
    """`apply_passes`'s arguments beside the graph and the passes."""
    verify, calibration = not options.no_verify, opened.calibration
    return {"verify": verify, "calibration": calibration, "on_pass": pass_line}


def calibration_of(
    options: argparse.Namespace, display: Display, passes: Sequence[Pass] | None = None
) -> Callable[[Any], Calibration] | None:
    """Makes calibration data, given the model's tokenizer; None without a text, or a pass that looks at it.

    Args:
        passes: those that will be applied; None for the recipe's.
    """
    if options.calibration is None:
        return None
    from rolora_passes.loading.data import conversations, load_text, random_windows, token_stream
    from rolora_passes.loading.tokens import beginning
    from rolora_passes.passes.base import Calibration
    from rolora_passes.recipes.opening import load_passes

    load_text(options.calibration, conversations())  # a bad text is refused before a model is loaded
    steps = load_passes(options.recipe, options.seed) if passes is None else passes
    if not any(step.needs_calibration for step in steps):
        console.print("no pass of the recipe looks at data: --calibration was not used")
        return None

    def make(tokenizer: Any) -> Calibration:
        stream = token_stream(load_text(options.calibration, conversations(tokenizer)), tokenizer)
        drawn = (options.samples, options.length, options.seed or 0, options.calibration)
        tokens = random_windows(stream, *drawn, beginning(tokenizer))
        return Calibration(tokens, options.work, display.count)

    return make
