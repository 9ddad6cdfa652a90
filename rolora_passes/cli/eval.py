"""`rolora eval`: perplexity and task accuracies of a model or an artefact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from rolora_passes.cli.display import Display, console, pass_line
from rolora_passes.cli.options import (
    at_least,
    calibration_of,
    print_options,
    printing_of,
    recipe_options,
)
from rolora_passes.export.target import TARGETS


def add(commands: Any) -> None:
    parser = commands.add_parser("eval", help="perplexity and task accuracies of a model or an artefact")
    at_least_1 = at_least(1, int)
    parser.add_argument("model", help="model folder, hub name, .gguf, saved graph, or compiled folder")
    parser.add_argument("--recipe", help="apply a recipe first, by name or .yaml")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        help="perplexity of this: .txt, .jsonl, or hub:NAME/CONFIG:SPLIT",
    )
    parser.add_argument(
        "--window", type=at_least(2, int), default=2048, help="tokens of a window (%(default)s)"
    )
    parser.add_argument("--windows", type=at_least_1, metavar="N", help="the first N windows (all)")
    parser.add_argument(
        "--tasks", type=lambda text: [t for t in text.split(",") if t], default=[], metavar="A,B",
        help="lm-eval's names, commonsense, .yaml files, or .jsonl files of question, choices, answer",
    )  # fmt: skip
    parser.add_argument("--task-limit", type=at_least_1, metavar="N", help="the first N examples of a task")
    parser.add_argument("--shots", type=at_least(0, int), help="examples shown first (each task's own)")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), help="(float32)")
    parser.add_argument(
        "--target", choices=list(TARGETS), help="which program of a compiled folder (its first)"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of a saved graph, which has none")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON")
    recipe_options(parser)
    print_options(parser)
    parser.set_defaults(run=run)


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
    elif options.calibration is not None:
        console.print("no pass of the recipe looks at data: --calibration was not used")
    Console().print(results_table(result))
    if options.output is not None:
        save_results(result, options.output)
