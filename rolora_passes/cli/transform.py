"""`rolora transform`: writes a Hugging Face checkpoint of what a recipe makes of a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rolora_passes.cli.display import Display, console, pass_line
from rolora_passes.cli.options import (
    MODEL,
    calibration_of,
    pass_options,
    print_options,
    printing_of,
    recipe_option,
)
from rolora_passes.cli.parser import byte_size

if TYPE_CHECKING:
    from rolora_passes.export.checkpoint import Transformed

ORDER = 15
SUMMARY = "write a checkpoint that transformers loads, rotated, merged or with rounded weights"
EXAMPLES = (
    "rolora transform MODEL --recipe rotated -o ROTATED",
    "rolora transform MODEL --recipe rtn:W4A8 --leave-out activation-quantizers --dtype bfloat16 -o ROUNDED",
    "rolora transform MODEL --adapter tuned/adapter -o MERGED",
)


def add(parser: argparse.ArgumentParser) -> None:
    from rolora_passes.export.checkpoint.leaving import LEFT_OUT

    parser.add_argument("model", help=MODEL)
    recipe_option(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="PEFT adapter to merge into the weights"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16", "float16"),
        help="type of the weights (default: that of the model's files; float32 of a .gguf)",
    )  # fmt: skip
    parser.add_argument(
        "--shard-size", type=byte_size, default="5GB", metavar="SIZE", help="tensors in one file, at most"
    )
    parser.add_argument(
        "--leave-out", action="append", default=[], choices=LEFT_OUT,
        help="what a recipe rounds while the model runs, and a checkpoint does not hold; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--no-check", action="store_true", help="do not load what was written and compare its logits"
    )
    pass_options(parser)
    print_options(parser)


def run(options: argparse.Namespace) -> None:
    import torch

    from rolora_passes.export.checkpoint import transform_model

    with Display() as display:
        done = transform_model(
            options.model,
            options.recipe,
            options.output,
            adapter=options.adapter,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            shard_size=options.shard_size,
            leave_out=options.leave_out,
            check=not options.no_check,
            seed=options.seed,
            calibration=calibration_of(options, display),
            printing={"verify": not options.no_verify, "on_pass": pass_line, **printing_of(options)},
            on_stage=display.stage,
            on_progress=display.count,
        )
    for line in _lines(done):
        console.print(line, markup=False, soft_wrap=True)


def _lines(done: Transformed) -> list[str]:
    files = "one file" if done.files == 1 else f"{done.files} files"
    dtype = str(done.dtype).removeprefix("torch.")
    lines = [f"{done.folder}: {done.bytes / 1e6:.1f} MB of {dtype} in {files}"]
    lines += ["the head has a table of its own now (tie_word_embeddings: false)"] if done.untied else []
    lines += [f"left out: {count} {kind.replace('-', ' ')}" for kind, count in done.left_out.items()]
    if done.rounding is not None:
        lines.append(
            "transformers loads it and gives the graph's logits; rounding the weights to "
            f"{dtype} moves them by {done.rounding:.1e}"
        )
    return lines
