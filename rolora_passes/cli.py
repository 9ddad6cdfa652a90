"""The command line: `rolora compile | run | inspect | passes`."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rolora_passes.errors import RoloraError, RunError

if TYPE_CHECKING:
    from rolora_passes.export.compile import Compiled
    from rolora_passes.manager import Record

_console = Console(stderr=True, highlight=False)


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
        _console.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        _console.print(str(error), markup=False, soft_wrap=True)
        return 2
    except MemoryError:
        _console.print("[bold red]error:[/] not enough memory for this model")
        return 2
    except KeyboardInterrupt:
        _console.print("interrupted; nothing was written")
        return 130
    return 0


def _hush() -> None:
    """Leave what other libraries say about themselves out, unless Python is asked for warnings (`-W`)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        for name in ("torchao", "torch.utils._pytree"):
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
        "--max-length", type=_at_least(1, int), default=512, help="tokens of context (%(default)s)"
    )
    compile_.add_argument(
        "--fast-prefill", action="store_true", help="attend in XNNPACK in calls from position 0"
    )
    compile_.add_argument("--no-verify", action="store_true", help="do not check the exact passes")
    compile_.set_defaults(run=_compile)

    run = commands.add_parser("run", help="generate text from a compiled folder in its stock runtime")
    run.add_argument("folder", type=Path)
    run.add_argument("--prompt", required=True)
    run.add_argument("--max-new-tokens", type=_at_least(1, int), default=64)
    run.add_argument("--temperature", type=_at_least(0, float), default=0.0)
    run.add_argument("--raw", action="store_true", help="do not wrap the prompt in the model's chat template")
    run.set_defaults(run=_run)

    look = commands.add_parser("inspect", help="what a model, a saved graph or a compiled folder is made of")
    look.add_argument("model", help="model folder, hub name, .gguf, saved graph, or compiled folder")
    look.add_argument(
        "--bases", action="store_true", help="which axes may rotate together, or what blocks them"
    )
    look.add_argument("--graph", action="store_true", help="the graph, a line a node")
    look.add_argument("--as-captured", action="store_true", help="before fuse-norm")
    look.set_defaults(run=_inspect)

    passes = commands.add_parser("passes", help="list the passes and recipes, or explain one pass")
    passes.add_argument("name", nargs="?")
    passes.set_defaults(run=_passes)
    return parser


def _compile(options: argparse.Namespace) -> None:
    from rolora_passes.export.compile import compile_model

    with _console.status("starting") as status:
        compiled = compile_model(
            options.model,
            options.recipe,
            options.output,
            max_length=options.max_length,
            fast_prefill=options.fast_prefill,
            verify=not options.no_verify,
            on_stage=lambda name: status.update(f"{name} …"),
            on_pass=_pass_line,
        )
    _summary(compiled)


def _pass_line(record: Record) -> None:
    checked = "" if record.error is None else f", same function to {record.error:.0e}"
    left = f", {len(record.report.left)} left" if record.report.left else ""
    _console.print(
        f"  {record.name:22} {len(record.report.changed):4} sites{left}, {record.seconds:.1f} s{checked}"
    )


def _summary(compiled: Compiled) -> None:
    table = Table(title=f"{compiled.folder / 'model.pte'}", show_header=False, title_justify="left")
    lowering, weights = compiled.lowering, compiled.weights
    table.add_row("size", f"{lowering.bytes / 1e6:.1f} MB")
    bits_each = f"{weights.bits_per_weight:.2f} bits each with scales"
    table.add_row("weights", f"{weights.elements / 1e6:.1f} M, {bits_each}")
    for bits, count in weights.by_bits.items():
        table.add_row("", f"{count / 1e6:.1f} M at {bits} bits")
    for record in compiled.history:
        table.add_row(record.name, _outcome(record))
    table.add_row("delegated", f"{lowering.delegates} XNNPACK delegates")
    outside = ", ".join(f"{count} {name}" for name, count in lowering.operators.items())
    table.add_row("not delegated", f"{sum(lowering.operators.values())} instructions: {outside}")
    table.add_row("seconds", ", ".join(f"{name} {value:.0f}" for name, value in compiled.seconds.items()))
    Console().print(table)


def _outcome(record: Record) -> str:
    text = f"{len(record.report.changed)} sites"
    if record.report.left:
        reasons = Counter(reason for _, reason in record.report.left)
        text += "".join(f"; {count} left: {reason}" for reason, count in reasons.most_common(2))
    return text


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
        with _console.status("capturing …"):
            graph = capture(load_model(options.model)[0])
    if not options.as_captured and "norms fused" not in graph.meta["facts"]:
        graph = apply_passes(graph, [FuseNorm()], verify=False)
    print(summary(graph), end="")
    if options.bases:
        print("\n" + bases_text(graph), end="")
    if options.graph:
        print("\n" + graph_text(graph), end="")


def _passes(options: argparse.Namespace) -> None:
    from rolora_passes.recipes import recipe_names
    from rolora_passes.registry import PASSES, pass_class

    if options.name:
        print(inspect.getdoc(pass_class(options.name)))
        return
    for name in PASSES:
        cls = pass_class(name)
        print(f"{name:22} {(inspect.getdoc(cls) or '').splitlines()[0]}")
    print(f"\nrecipes: {', '.join(recipe_names())}")


if __name__ == "__main__":
    sys.exit(main())
