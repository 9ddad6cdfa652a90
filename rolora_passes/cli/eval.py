"""`rolora eval`: perplexity and task accuracy of a model, a saved graph or a compiled folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from rolora_passes.cli.display import Display, pass_line
from rolora_passes.cli.options import (
    ANY,
    TEXT,
    calibration_of,
    pass_options,
    print_options,
    printing_of,
    recipe_option,
    tokenizer_option,
)
from rolora_passes.cli.parser import at_least

ORDER = 50
SUMMARY = "measure perplexity and task accuracy of a model, a saved graph or a compiled folder"
EXAMPLES = (
    "rolora eval MODEL --recipe rotated-8da4w --text wikitext2.txt --tasks piqa,arc_easy",
    "rolora eval COMPILED --target onnx --text wikitext2.txt --windows 8",
)


def add(parser: argparse.ArgumentParser) -> None:
    from rolora_passes.export.target import TARGETS

    at_least_1 = at_least(1, int)
    parser.add_argument("model", help=ANY)
    recipe_option(parser, "apply this first")
    parser.add_argument(
        "--text", action="append", default=[], help=f"measure perplexity on this; may be repeated: {TEXT}"
    )
    parser.add_argument(
        "--window", type=at_least(2, int), default=2048, metavar="TOKENS", help="tokens in a window"
    )
    parser.add_argument(
        "--windows", type=at_least_1, metavar="N", help="windows, from the start of each text (default: all)"
    )
    parser.add_argument(
        "--tasks", type=_names, default=[], metavar="A,B",
        help="lm-eval tasks by name, commonsense, .yaml files, or .jsonl files of question, choices, answer",
    )  # fmt: skip
    parser.add_argument(
        "--task-limit", type=at_least_1, metavar="N", help="examples of each task (default: all)"
    )
    parser.add_argument(
        "--shots",
        type=at_least(0, int),
        metavar="N",
        help="solved examples in each prompt (default: the task's)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float64", "bfloat16", "float16"),
        help="compute in this type (default: float32; a saved graph's own)",
    )  # fmt: skip
    parser.add_argument(
        "--target",
        choices=list(TARGETS),
        help="which program of a compiled folder (default: its first)",
    )
    tokenizer_option(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON")
    pass_options(parser)
    print_options(parser)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


_names.words = "list"  # type: ignore[attr-defined]


def run(options: argparse.Namespace) -> None:
    import torch

    from rolora_passes.evaluation.report import Measures, evaluate, results_table, save_results

    if options.output is not None and options.output.is_dir():
        raise IsADirectoryError(f"expected a file to write, found a folder at {options.output}")
    measures = Measures(
        options.text, options.window, options.windows, options.tasks, options.task_limit, options.shots
    )
    with Display() as display:
        result = evaluate(
            options.model,
            measures,
            seed=options.seed,
            recipe=options.recipe,
            calibration=calibration_of(options, display),
            tokenizer=options.tokenizer,
            target=options.target,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            verify=not options.no_verify,
            on_stage=display.stage,
            on_progress=display.count,
            on_pass=pass_line,
            printing=printing_of(options),
        )
    if "calibration" in result:
        result["calibration"] |= {"text": Path(options.calibration).name, "seed": options.seed or 0}
    Console().print(results_table(result))
    if options.output is not None:
        save_results(result, options.output)
