"""Measure ExecuTorch language models (`.pte`) side by side.

    python benchmarks/bench_executorch.py peer=peer.pte ours=ours.pte --tokenizer tokenizer.json

Every file's `forward(tokens int64[1, S], input_pos int64[1])` is run on ExecuTorch's own Python
runtime, and only that call is timed, so that what Python costs stays outside. How rounds are made and
what the table says: see `rounds.py`.

`--sample TEXT` also generates through the stock `TextLLMRunner`; `--census` counts what each file
is made of, and runs nothing.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rounds import (
    Generate,
    Result,
    Stopwatch,
    Times,
    Workload,
    add_options,
    in_fresh_process,
    report_speed,
    timed,
    write_json,
)

# Inside a worker process


def import_runtime(threads: int | None) -> Any:
    """The runtime's Python binding, with the LLM and quantized kernels registered."""
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401  registers kernels
    import torch
    from executorch.extension.pybindings import portable_lib

    if threads is not None:
        portable_lib._unsafe_reset_threadpool(threads)
    torch.set_num_threads(1)  # only the argmax is torch's
    return portable_lib


def next_token(logits: Any) -> int:
    """The greedy token after logits of shape [1, V] or [1, S, V]."""
    return int(logits.reshape(-1, logits.shape[-1])[-1].argmax())


def generate_once(method: Any, prompt: Sequence[int], count: int) -> tuple[list[int], Times]:
    """Prefill the prompt and decode `count` tokens; return these and the times of all calls."""
    import torch

    call = Stopwatch()

    def step(tokens: Sequence[int], start: int) -> int:
        inputs = (torch.tensor([tokens]), torch.tensor([start]))
        return next_token(call(method.call, inputs, clone_outputs=False)[0])

    tokens = [step(prompt, 0)]
    for position in range(len(prompt), len(prompt) + count):
        tokens.append(step(tokens[-1:], position))
    return tokens, call.times


def measure(path: str, workload: Workload) -> Result:
    """Load a file and time it. Runs in a fresh process."""
    runtime = import_runtime(workload.threads)
    program = None

    def load() -> Generate:
        nonlocal program
        program = runtime._load_program(path)  # must outlive the method
        method = program.load_method("forward")
        return lambda prompt, count: generate_once(method, prompt, count)

    threads = runtime._threadpool_get_thread_count()
    return {**timed(load, workload), "file_mb": os.path.getsize(path) / 1e6, "threads": threads}


def sample(path: str, tokenizer: str, text: str, count: int, threads: int | None) -> dict[str, Any]:
    """Generate greedily with the stock runner; return the text and the runner's own figures."""
    import_runtime(threads)
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    pieces: list[str] = []
    stats: list[dict[str, int]] = []
    config = GenerationConfig(max_new_tokens=count, temperature=0.0, echo=False)
    runner = TextLLMRunner(path, tokenizer)
    runner.generate(text, config, pieces.append, lambda s: stats.append(runner_stats(s)))
    return {"text": "".join(pieces), **stats[-1]}


def runner_stats(stats: Any) -> dict[str, int]:
    """The stock runner's counts and milliseconds, which are integers."""
    return {
        "prompt_tokens": stats.num_prompt_tokens,
        "generated_tokens": stats.num_generated_tokens,
        "prefill_ms": stats.prompt_eval_end_ms - stats.inference_start_ms,
        "decode_ms": stats.inference_end_ms - stats.prompt_eval_end_ms,
    }


def census(path: str) -> dict[str, Any]:
    """Count what a file's `forward` is made of: delegate calls, kernel calls, planned memory."""
    from executorch.exir._serialize import _deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall

    program = _deserialize_pte_binary(Path(path).read_bytes()).program
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    calls = [step.instr_args for chain in plan.chains for step in chain.instructions]
    kernels = Counter(
        ".".join(filter(None, (operator.name, operator.overload)))
        for operator in (plan.operators[c.op_index] for c in calls if isinstance(c, KernelCall))
    )
    return {
        "delegates": len(plan.delegates),
        "delegate_calls": sum(isinstance(c, DelegateCall) for c in calls),
        "other_instructions": sum(not isinstance(c, DelegateCall) for c in calls),
        "kernel_calls": kernels.total(),
        "kernels": dict(kernels.most_common()),
        "planned_mb": sum(plan.non_const_buffer_sizes) / 1e6,
        "file_mb": os.path.getsize(path) / 1e6,
    }


# In the parent process


def format_census(name: str, counts: dict[str, Any]) -> str:
    """A census as text."""
    lines = [
        f"{name}: {counts['file_mb']:.1f} MB, {counts['planned_mb']:.1f} MB planned, "
        f"{counts['delegates']} delegates ({counts['delegate_calls']} calls), "
        f"{counts['other_instructions']} other instructions ({counts['kernel_calls']} kernel calls)"
    ]
    lines += [f"{count:8}  {kernel}" for kernel, count in counts["kernels"].items()]
    return "\n".join(lines)


def named_file(argument: str) -> tuple[str, str]:
    """Parse `NAME=PATH`."""
    name, separator, path = argument.partition("=")
    if not separator or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"expected NAME=PATH of a file, not {argument!r}")
    return name, path


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=named_file, metavar="NAME=PATH.pte")
    parser.add_argument("--tokenizer", help="tokenizer.json, for a prompt of real text")
    parser.add_argument("--sample", metavar="TEXT", help="generate from this with TextLLMRunner")
    parser.add_argument("--census", action="store_true", help="count instructions; run nothing")
    add_options(parser)
    options = parser.parse_args()
    if options.sample and not options.tokenizer:
        parser.error("--sample needs --tokenizer")
    return options


def report_census(files: dict[str, str]) -> dict[str, Any]:
    """Print the census of every file."""
    counts = {name: in_fresh_process(census, path) for name, path in files.items()}
    print("\n\n".join(format_census(name, count) for name, count in counts.items()))
    return {"census": counts}


def report_samples(files: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Print what the stock runner writes with every file, and its own timings."""
    arguments = (options.tokenizer, options.sample, options.decode, options.threads)
    samples = {name: in_fresh_process(sample, path, *arguments) for name, path in files.items()}
    for name, result in samples.items():
        print(f"{name}, stock runner: {result}")
    return {"samples": samples}


def main() -> None:
    """Measure the files on the command line."""
    options = parse_arguments()
    files = dict(options.files)
    if options.census:
        report = report_census(files)
    else:
        report = report_speed(
            {name: (measure, path) for name, path in files.items()}, options, options.tokenizer
        )
        if options.sample:
            report |= report_samples(files, options)
    write_json(options.json, report)


if __name__ == "__main__":
    main()
