"""Measure ExecuTorch language models (`.pte`) side by side.

    python benchmarks/executorch.py peer=peer.pte ours=ours.pte --tokenizer tokenizer.json

Every file's `forward(tokens int64[1, S], input_pos int64[1])` is run on ExecuTorch's own Python
runtime, and only that call is timed, so that what Python costs stays outside. A round measures each
file once, in a fresh process with the same number of threads. Rounds alternate the files, and the
order within a round flips, so that drift and neighbours meet all alike. Within a process, after a
warm-up, the same generation is repeated and every call counts with the least time it took: bursts
of other load fall out. The table gives medians over the rounds, and ratios to the first file of the
same round: median (min..max). On a shared machine trust `--threads 1` and tokens per CPU-second.

`--sample TEXT` also generates through the stock `TextLLMRunner`; `--census` counts what each file
is made of, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

# This file is named as the package it measures: keep its directory off the path, which the worker
# processes inherit. The package is only imported inside functions.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _HERE]

PASSAGE = (
    "The lighthouse keeper climbed the stairs every evening at dusk, counting them as his father "
    "had done. There were two hundred and eleven, and on the last of them he always stopped to "
    "look at the sea. In summer the fishing boats came home late and their lamps made a second "
    "shore on the water. In winter nothing moved but the weather. He wrote down the wind, the "
    "height of the waves and the hour, in a book that nobody had asked to read for many years. "
)

# The metrics of a round: label, key, decimals.
METRICS = (
    ("file, MB", "file_mb", 1),
    ("load, s", "load_s", 3),
    ("prefill, tokens/s", "prefill", 1),
    ("decode, tokens/s", "decode", 1),
    ("prefill, tokens/CPU-s", "prefill_cpu", 1),
    ("decode, tokens/CPU-s", "decode_cpu", 1),
    ("peak RSS, MB", "peak_rss_mb", 1),
    ("RSS over imports, MB", "model_rss_mb", 1),
)


Times = list[tuple[float, float]]  # wall and CPU seconds, call by call


@dataclass(frozen=True)
class Workload:
    """What one measurement runs: a prompt, tokens to decode greedily, repetitions, threads."""

    prompt: tuple[int, ...]
    decode: int = 64
    repeats: int = 10
    threads: int | None = None


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


def memory_mb(field: str) -> float:
    """A field of this process's memory: `VmRSS` (now) or `VmHWM` (peak). Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def next_token(logits: Any) -> int:
    """The greedy token after logits of shape [1, V] or [1, S, V]."""
    return int(logits.reshape(-1, logits.shape[-1])[-1].argmax())


class Stepper:
    """A loaded `forward` that keeps the wall and CPU seconds of every call."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self.times: list[tuple[float, float]] = []

    def __call__(self, tokens: Sequence[int], start: int) -> int:
        """Run `forward` on the tokens at position `start`; return the next token."""
        import torch

        inputs = (torch.tensor([tokens]), torch.tensor([start]))
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = self._method.call(inputs, clone_outputs=False)
        spent_cpu = time.process_time() - cpu
        self.times.append((time.perf_counter() - wall, spent_cpu))
        return next_token(outputs[0])


def generate_once(method: Any, prompt: Sequence[int], count: int) -> tuple[list[int], Times]:
    """Prefill the prompt and decode `count` tokens; return these and the times of all calls."""
    step = Stepper(method)
    tokens = [step(prompt, 0)]
    for position in range(len(prompt), len(prompt) + count):
        tokens.append(step(tokens[-1:], position))
    return tokens, step.times


def rates(runs: Sequence[Times], workload: Workload) -> dict[str, float]:
    """Tokens per wall and CPU second: every call counts with the least it took in any run."""
    result = {}
    for clock, suffix in enumerate(("", "_cpu")):
        least = [min(times[clock] for times in calls) for calls in zip(*runs, strict=True)]
        result["prefill" + suffix] = len(workload.prompt) / least[0]
        result["decode" + suffix] = workload.decode / sum(least[1:])
    return result


def measure(path: str, workload: Workload) -> dict[str, Any]:
    """Load a file and time it. Runs in a fresh process, for its memory and threads are measured."""
    runtime = import_runtime(workload.threads)
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    program = runtime._load_program(path)  # must outlive the method
    method = program.load_method("forward")
    load = time.perf_counter() - start

    generate_once(method, workload.prompt, min(8, workload.decode))  # warm-up
    runs = [generate_once(method, workload.prompt, workload.decode) for _ in range(workload.repeats)]
    peak = memory_mb("VmHWM")
    return {
        "file_mb": os.path.getsize(path) / 1e6,
        "load_s": load,
        **rates([times for _, times in runs], workload),
        "peak_rss_mb": peak,
        "model_rss_mb": peak - before,
        "threads": runtime._threadpool_get_thread_count(),
        "tokens": runs[0][0],
    }


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


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of this module in a process made for it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_rounds(files: dict[str, str], workload: Workload, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Measure every file once a round, flipping the order from round to round."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    for number in range(rounds):
        names = list(files) if number % 2 == 0 else list(reversed(files))
        for name in names:
            result = in_fresh_process(measure, files[name], workload)
            results[name].append(result)
            print(
                f"round {number + 1}/{rounds} {name}: prefill {result['prefill']:.1f}, "
                f"decode {result['decode']:.1f} tokens/s",
                file=sys.stderr,
            )
    check_threads(results)
    return results


def check_threads(results: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse to compare measurements made with different numbers of threads."""
    counts = {result["threads"] for rounds in results.values() for result in rounds}
    if len(counts) != 1:
        raise RuntimeError(f"the files ran with different numbers of threads: {sorted(counts)}")


def summarize(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of every metric, and ratios to the first file of the same round."""
    first = next(iter(results.values()))
    medians: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, rounds in results.items():
        medians[name] = {key: median(r[key] for r in rounds) for _, key, _ in METRICS}
        ratios[name] = {key: ratio(rounds, first, key) for _, key, _ in METRICS}
    return {"median": medians, "ratio": ratios}


def ratio(rounds: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """Median, least and greatest of a metric's ratios, round by round."""
    values = [mine[key] / theirs[key] for mine, theirs in zip(rounds, base, strict=True)]
    return median(values), min(values), max(values)


def format_table(summary: dict[str, Any]) -> str:
    """The summary as text: a line for a metric, a column for a file, then one for each ratio."""
    names = list(summary["median"])
    heads = names + [f"{name}/{names[0]}" for name in names[1:]]
    lines = [f"{'':24}" + "".join(f"{head:>22}" for head in heads)]
    for label, key, digits in METRICS:
        cells = [f"{summary['median'][name][key]:.{digits}f}" for name in names]
        for name in names[1:]:
            middle, low, high = summary["ratio"][name][key]
            cells.append(f"{middle:.3f} ({low:.3f}..{high:.3f})")
        lines.append(f"{label:24}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def format_census(name: str, counts: dict[str, Any]) -> str:
    """A census as text."""
    lines = [
        f"{name}: {counts['file_mb']:.1f} MB, {counts['planned_mb']:.1f} MB planned, "
        f"{counts['delegates']} delegates ({counts['delegate_calls']} calls), "
        f"{counts['other_instructions']} other instructions ({counts['kernel_calls']} kernel calls)"
    ]
    lines += [f"{count:8}  {kernel}" for kernel, count in counts["kernels"].items()]
    return "\n".join(lines)


def prompt_ids(tokenizer: str | None, count: int) -> tuple[int, ...]:
    """Exactly `count` token ids: of a passage, or arbitrary ones when there is no tokenizer."""
    if tokenizer is None:
        return tuple(range(100, 100 + count))
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(tokenizer)
    ids = encoder.encode(PASSAGE, add_special_tokens=False).ids
    return tuple((ids * (count // len(ids) + 1))[:count])


def decode_text(tokenizer: str, tokens: Sequence[int]) -> str:
    """The text of token ids."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(tokenizer).decode(list(tokens))


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
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=10, help="repetitions within a round")
    parser.add_argument("--threads", type=int, help="default: the runtime's own choice")
    parser.add_argument("--sample", metavar="TEXT", help="generate from this with TextLLMRunner")
    parser.add_argument("--census", action="store_true", help="count instructions; run nothing")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args()
    if options.sample and not options.tokenizer:
        parser.error("--sample needs --tokenizer")
    return options


def report_census(files: dict[str, str]) -> dict[str, Any]:
    """Print the census of every file."""
    counts = {name: in_fresh_process(census, path) for name, path in files.items()}
    print("\n\n".join(format_census(name, count) for name, count in counts.items()))
    return {"census": counts}


def report_speed(files: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure, then print the table and the beginning of what each file wrote."""
    prompt = prompt_ids(options.tokenizer, options.prompt_tokens)
    workload = Workload(prompt, options.decode, options.repeats, options.threads)
    results = run_rounds(files, workload, options.rounds)
    summary = summarize(results)
    threads = next(iter(results.values()))[0]["threads"]
    print(f"{options.rounds} rounds, {threads} threads, {len(prompt)} + {options.decode} tokens")
    print(format_table(summary))
    for name, rounds in results.items() if options.tokenizer else ():
        print(f"{name} wrote: {decode_text(options.tokenizer, rounds[0]['tokens'])!r}")
    return {"threads": threads, "rounds": results, **summary}


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
        report = report_speed(files, options)
        if options.sample:
            report |= report_samples(files, options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
