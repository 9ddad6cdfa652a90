"""The command line: `rolora compile | run | eval | sensitivity | inspect | passes`."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rolora_passes.display import Display, console, pass_line, print_summary
from rolora_passes.errors import RoloraError, RunError

if TYPE_CHECKING:
    from rolora_passes.passes import Calibration


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for an error the user can act on)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = _parser().parse_args(arguments)
    _hush()
    try:
        options.run(options)
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RoloraError, OSError) as error:
        console.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2
    except MemoryError:
        console.print("[bold red]error:[/] not enough memory for this model")
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        return 130
    return 0


def _hush() -> None:
    """Leave what other libraries say about themselves out, unless Python is asked for warnings (`-W`)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        for name in ("torchao", "torch.utils._pytree", "lm_eval"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _at_least(low: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"expected {low} or more, found {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it where a text is no number
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "rolora", description="Passes over graphs of language models, to the phone"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compile_ = commands.add_parser("compile", help="model in, .pte and report out")
    compile_.add_argument("model", help="model folder, hub name, or .gguf file")
    compile_.add_argument("--recipe", default="rotated-8da4w", help="recipe name or .yaml (%(default)s)")
    compile_.add_argument("-o", "--output", required=True, type=Path, help="folder to write")
    compile_.add_argument(
        "--max-length", type=_at_least(16, int), default=512, help="tokens of context (%(default)s)"
    )
    compile_.add_argument(
        "--fast-prefill", action="store_true", help="attend in XNNPACK in calls from position 0"
    )
    _recipe_options(compile_)
    compile_.set_defaults(run=_compile)

    run = commands.add_parser("run", help="generate text from a compiled folder in its stock runtime")
    run.add_argument("folder", type=Path)
    run.add_argument("--prompt", required=True)
    run.add_argument("--max-new-tokens", type=_at_least(1, int), default=64)
    run.add_argument("--temperature", type=_at_least(0, float), default=0.0)
    run.add_argument("--raw", action="store_true", help="do not wrap the prompt in the model's chat template")
    run.set_defaults(run=_run)

    _add_eval(commands.add_parser("eval", help="perplexity and task accuracies of a model or an artefact"))

    rank = commands.add_parser("sensitivity", help="which linears lose the most when quantized alone")
    rank.add_argument("model", help="model folder, hub name, .gguf, or saved graph")
    rank.add_argument("--recipe", required=True, help="its quantizers are tried, on what it does before them")
    rank.add_argument("--text", required=True, help=".txt, .jsonl, or hub:NAME/CONFIG:SPLIT")
    rank.add_argument(
        "--window", type=_at_least(2, int), default=512, help="tokens of a window (%(default)s)"
    )
    rank.add_argument(
        "--windows", type=_at_least(1, int), default=1, help="the first N windows (%(default)s)"
    )
    rank.add_argument("--top", type=_at_least(1, int), default=20, help="rows to print (%(default)s)")
    rank.add_argument("--tokenizer", metavar="FOLDER", help="of a saved graph, which has none")
    rank.add_argument("-o", "--output", type=Path, metavar="FILE", help="write all rows as JSON")
    _recipe_options(rank)
    rank.set_defaults(run=_sensitivity)

    look = commands.add_parser("inspect", help="what a model, a saved graph or a compiled folder is made of")
    look.add_argument("model", help="model folder, hub name, .gguf, saved graph, or compiled folder")
    look.add_argument(
        "--bases", action="store_true", help="which axes may rotate together, or what blocks them"
    )
    look.add_argument("--graph", action="store_true", help="the graph, a line a node")
    look.add_argument("--as-captured", action="store_true", help="before fuse-norm")
    look.set_defaults(run=_inspect)

    passes = commands.add_parser("passes", help="list the passes and recipes, or explain one")
    passes.add_argument("name", nargs="?")
    passes.set_defaults(run=_passes)
    return parser


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    """What the passes of a recipe are given."""
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help="for passes that look at data: .txt, .jsonl, or hub:NAME/CONFIG:SPLIT",
    )
    at_least_1 = _at_least(1, int)
    parser.add_argument("--samples", type=at_least_1, default=128, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=at_least_1, default=2048, help="their tokens (%(default)s)")
    parser.add_argument(
        "--seed",
        type=_at_least(0, int),
        help="of all that is drawn at random (0; a recipe's own in its passes)",
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep what passes have finished, to go on if interrupted"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not check the exact passes")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    at_least_1 = _at_least(1, int)
    parser.add_argument("model", help="model folder, hub name, .gguf, saved graph, or compiled folder")
    parser.add_argument("--recipe", help="apply a recipe first, by name or .yaml")
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        help="perplexity of this: .txt, .jsonl, or hub:NAME/CONFIG:SPLIT",
    )
    parser.add_argument(
        "--window", type=_at_least(2, int), default=2048, help="tokens of a window (%(default)s)"
    )
    parser.add_argument("--windows", type=at_least_1, metavar="N", help="the first N windows (all)")
    parser.add_argument(
        "--tasks", type=lambda text: [t for t in text.split(",") if t], default=[], metavar="A,B",
        help="lm-eval's names, commonsense, .yaml files, or .jsonl files of question, choices, answer",
    )  # fmt: skip
    parser.add_argument("--task-limit", type=at_least_1, metavar="N", help="the first N examples of a task")
    parser.add_argument("--shots", type=_at_least(0, int), help="examples shown first (each task's own)")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), help="(float32)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of a saved graph, which has none")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON")
    _recipe_options(parser)
    parser.set_defaults(run=_eval)


def _calibration(options: argparse.Namespace, display: Display) -> Callable[[Any], Calibration] | None:
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


def _compile(options: argparse.Namespace) -> None:
    from rolora_passes.export.compile import compile_model

    with Display() as display:
        compiled = compile_model(
            options.model,
            options.recipe,
            options.output,
            max_length=options.max_length,
            fast_prefill=options.fast_prefill,
            verify=not options.no_verify,
            calibration=_calibration(options, display),
            seed=options.seed,
            on_stage=display.stage,
            on_pass=pass_line,
        )
    print_summary(compiled)


def _eval(options: argparse.Namespace) -> None:
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
            calibration=_calibration(options, display),
            tokenizer=options.tokenizer,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            verify=not options.no_verify,
            on_stage=display.stage,
            on_progress=display.count,
            on_pass=pass_line,
        )
    if "calibration" in result:
        result["calibration"] |= {"text": Path(options.calibration).name, "seed": options.seed or 0}
    elif options.calibration is not None:
        console.print("no pass of the recipe looks at data: --calibration was not used")
    Console().print(results_table(result))
    if options.output is not None:
        save_results(result, options.output)


def _sensitivity(options: argparse.Namespace) -> None:
    from rolora_passes.evaluation.ranking import rank_sites, ranking_table
    from rolora_passes.evaluation.report import save_results

    with Display() as display:
        result = rank_sites(
            options.model,
            options.recipe,
            options.text,
            options.window,
            options.windows,
            seed=options.seed,
            calibration=_calibration(options, display),
            tokenizer=options.tokenizer,
            verify=not options.no_verify,
            on_stage=display.stage,
            on_progress=display.count,
            on_pass=pass_line,
        )
    Console().print(ranking_table(result, options.top))
    if options.output is not None:
        save_results(result, options.output)


def _run(options: argparse.Namespace) -> None:
    from rolora_passes.export.runner import generate

    manifest = options.folder / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(
            f"expected a folder that `rolora compile` wrote, found no manifest.json in {options.folder}"
        )
    prompt = options.prompt if options.raw else _chat(options.folder, options.prompt)
    screen = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # the runner's own output is put aside
    try:
        generate(
            options.folder / "model.pte",
            options.folder / "tokenizer.json",
            prompt,
            options.max_new_tokens,
            options.temperature,
            on_text=lambda text: print(text, end="", flush=True, file=screen),
        )
    except RuntimeError as error:  # the runner's own
        program = options.folder / "model.pte"
        raise RunError(f"the runner failed on {program}: {error}; its log is above") from error
    print(file=screen, flush=True)


def _chat(folder: Path, prompt: str) -> str:
    """The prompt in the model's own chat template, where the tokenizer has one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _inspect(options: argparse.Namespace) -> None:
    from rolora_passes.fuse_norm import FuseNorm
    from rolora_passes.graphs.capture import capture
    from rolora_passes.graphs.inspect import bases_text, summary
    from rolora_passes.graphs.serialize import load_graph
    from rolora_passes.graphs.text import graph_text
    from rolora_passes.manager import apply_passes
    from rolora_passes.models import load_model

    folder = Path(options.model)
    if (folder / "manifest.json").is_file():
        print((folder / "manifest.json").read_text("utf-8"))
        return
    if folder.suffix == ".safetensors":
        graph = load_graph(folder)
    else:
        with console.status("capturing …"):
            graph = capture(load_model(options.model)[0])
    if not options.as_captured and "norms fused" not in graph.meta["facts"]:
        graph = apply_passes(graph, [FuseNorm()], verify=False)
    print(summary(graph), end="")
    if options.bases:
        print("\n" + bases_text(graph), end="")
    if options.graph:
        print("\n" + graph_text(graph), end="")


def _passes(options: argparse.Namespace) -> None:
    from rolora_passes.recipes import dump_recipe, load_recipe, recipe_names
    from rolora_passes.registry import PASSES, pass_class
    from rolora_passes.settings import METHODS

    if (options.name and options.name in recipe_names()) or ":" in (options.name or ""):
        print(dump_recipe(load_recipe(options.name)), end="")
        return
    if options.name:
        print(inspect.getdoc(pass_class(options.name)))
        return
    for name in PASSES:
        cls = pass_class(name)
        print(f"{name:22} {(inspect.getdoc(cls) or '').splitlines()[0]}")
    print(f"\nrecipes: {', '.join(recipe_names())}")
    print(f"methods, at any setting: {', '.join(f'{name}:W4A4KV4' for name in METHODS)}")


if __name__ == "__main__":
    sys.exit(main())
