"""Programs that generate text, measured side by side: what the benchmarks of runtimes share.

A round measures each program once, in a fresh process with the same number of threads. Rounds alternate
the programs, and the order within a round flips, so that drift and neighbours meet all alike. Within a
process, after a warm-up, the same generation is repeated and every call counts with the least time it
took: bursts of other load fall out. The table gives medians over the rounds, and ratios to the first
program of the same round: median (min..max). On a shared machine trust one thread and tokens per
CPU-second.

Nothing here imports a runtime or torch: the memory of a measured process is what its runtime takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

PASSAGE = (
    "The lighthouse keeper climbed the stairs every evening at dusk, counting them as his father "
    "had done. There were two hundred and eleven, and on the last of them he always stopped to "
    "look at the sea. In summer the fishing boats came home late and their lamps made a second "
    "shore on the water. In winter nothing moved but the weather. He wrote down the wind, the "
    "height of the waves and the hour, in a book that nobody had asked to read for many years. "
)

# The metrics of a round: label, key, decimals.
METRICS = (
    ("files, MB", "file_mb", 1),
    ("load, s", "load_s", 3),
    ("prefill, tokens/s", "prefill", 1),
    ("decode, tokens/s", "decode", 1),
    ("prefill, tokens/CPU-s", "prefill_cpu", 1),
    ("decode, tokens/CPU-s", "decode_cpu", 1),
    ("peak RSS, MB", "peak_rss_mb", 1),
    ("RSS over imports, MB", "model_rss_mb", 1),
)

T = TypeVar("T")
Result = dict[str, Any]
Measure = Callable[[str, "Workload"], Result]
Times = list[tuple[float, float]]  # wall and CPU seconds, call by call
Generate = Callable[[Sequence[int], int], tuple[list[int], Times]]
"""Prompt and count -> the greedy tokens (one from the prompt, then `count`) and the times of these calls."""


@dataclass(frozen=True)
class Workload:
    """What one measurement runs.

    Attributes:
        prompt: token ids, all in one call.
        decode: tokens to decode greedily after it, one a call.
        repeats: generations within a round.
        threads: of the runtime; None leaves it the choice.
    """

    prompt: tuple[int, ...]
    decode: int = 64
    repeats: int = 10
    threads: int | None = None

    @property
    def context(self) -> int:
        """Tokens the caches hold where the file does not fix it: as compiled programs, if that will do."""
        return max(512, len(self.prompt) + self.decode + 1)


# Inside a worker process


class Stopwatch:
    """Keeps the wall and CPU seconds of every call made through it."""

    def __init__(self) -> None:
        self.times: Times = []

    def __call__(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call the function; only the call itself is timed."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments, **named)
        spent_cpu = time.process_time() - cpu
        self.times.append((time.perf_counter() - wall, spent_cpu))
        return result


def timed(load: Callable[[], Generate], workload: Workload) -> Result:
    """Load a program and time it; this process must be fresh, for its memory and threads are measured.

    What the runtime needs must be imported already. The caller adds `file_mb` and `threads`.
    """
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    generate = load()
    load_seconds = time.perf_counter() - start

    generate(workload.prompt, min(8, workload.decode))  # warm-up
    earlier = thread_seconds()
    runs = [generate(workload.prompt, workload.decode) for _ in range(workload.repeats)]
    peak = memory_mb("VmHWM")
    return {
        "load_s": load_seconds,
        **rates([times for _, times in runs], workload),
        "peak_rss_mb": peak,
        "model_rss_mb": peak - before,
        "busy_threads": busy_threads(earlier, thread_seconds()),
        "tokens": runs[0][0],
    }


def memory_mb(field: str) -> float:
    """A field of this process's memory: `VmRSS` (now) or `VmHWM` (peak). Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def thread_seconds() -> dict[str, float]:
    """The CPU seconds of every thread of this process, by its id. Linux only."""
    tick = os.sysconf("SC_CLK_TCK")
    seconds = {}
    for stat in Path("/proc/self/task").glob("*/stat"):
        fields = stat.read_text().rpartition(")")[2].split()  # the name before it may hold spaces
        seconds[stat.parent.name] = (int(fields[11]) + int(fields[12])) / tick
    return seconds


def busy_threads(before: dict[str, float], after: dict[str, float]) -> int:
    """How many threads took at least 5 % of the CPU seconds in between."""
    spent = [seconds - before.get(thread, 0.0) for thread, seconds in after.items()]
    return sum(seconds >= 0.05 * sum(spent) for seconds in spent)


def rates(runs: Sequence[Times], workload: Workload) -> dict[str, float]:
    """Tokens per wall and CPU second: every call counts with the least it took in any run."""
    result = {}
    for clock, suffix in enumerate(("", "_cpu")):
        least = [min(times[clock] for times in calls) for calls in zip(*runs, strict=True)]
        result["prefill" + suffix] = len(workload.prompt) / least[0]
        result["decode" + suffix] = workload.decode / sum(least[1:])
    return result


# In the parent process


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a module in a process made for it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_rounds(
    programs: dict[str, tuple[Measure, str]], workload: Workload, rounds: int
) -> dict[str, list[Result]]:
    """Measure every program (how, and its path) once a round, flipping the order from round to round."""
    results: dict[str, list[Result]] = {name: [] for name in programs}
    for number in range(rounds):
        names = list(programs) if number % 2 == 0 else list(reversed(programs))
        for name in names:
            measure, path = programs[name]
            result = in_fresh_process(measure, path, workload)
            results[name].append(result)
            print(
                f"round {number + 1}/{rounds} {name}: prefill {result['prefill']:.1f}, "
                f"decode {result['decode']:.1f} tokens/s",
                file=sys.stderr,
            )
        check_threads(results, workload.threads)
    return results


def check_threads(results: dict[str, list[Result]], asked: int | None) -> None:
    """Refuse to compare measurements with different numbers of threads, or others than were asked for.

    With one thread, no other may have worked. With more, a runtime may keep several pools that take turns.
    """
    counts = {name: sorted({result["threads"] for result in rounds}) for name, rounds in results.items()}
    found = {count for each in counts.values() for count in each}
    if len(found) != 1 or (asked is not None and found != {asked}):
        raise RuntimeError(
            f"expected {asked or 'as many'} threads in every program and round, found {counts}"
        )
    busy = {name: max(result["busy_threads"] for result in rounds) for name, rounds in results.items()}
    if found == {1} and max(busy.values()) > 1:
        raise RuntimeError(f"expected one thread to work, found {busy}")


def summarize(results: dict[str, list[Result]]) -> dict[str, Any]:
    """Medians of every metric, and ratios to the first program of the same round."""
    first = next(iter(results.values()))
    medians: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, rounds in results.items():
        medians[name] = {key: median(r[key] for r in rounds) for _, key, _ in METRICS}
        ratios[name] = {key: ratio(rounds, first, key) for _, key, _ in METRICS}
    return {"median": medians, "ratio": ratios}


def ratio(rounds: list[Result], base: list[Result], key: str) -> tuple[float, float, float]:
    """Median, least and greatest of a metric's ratios, round by round."""
    values = [mine[key] / theirs[key] for mine, theirs in zip(rounds, base, strict=True)]
    return median(values), min(values), max(values)


def format_table(summary: dict[str, Any]) -> str:
    """The summary as text: a line for a metric, a column for a program, then one for each ratio."""
    names = list(summary["median"])
    heads = names + [f"{name}/{names[0]}" for name in names[1:]]
    widths = [max(22, len(head) + 2) for head in heads]
    lines = [f"{'':24}" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    for label, key, digits in METRICS:
        cells = [f"{summary['median'][name][key]:.{digits}f}" for name in names]
        for name in names[1:]:
            middle, low, high = summary["ratio"][name][key]
            cells.append(f"{middle:.3f} ({low:.3f}..{high:.3f})")
        lines.append(f"{label:24}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def report_speed(
    programs: dict[str, tuple[Measure, str]], options: argparse.Namespace, tokenizer: str | None
) -> dict[str, Any]:
    """Measure, then print the table and the beginning of what each program wrote."""
    prompt = prompt_ids(tokenizer, options.prompt)
    workload = Workload(prompt, options.decode, options.repeats, options.threads)
    results = run_rounds(programs, workload, options.rounds)
    summary = summarize(results)
    threads = next(iter(results.values()))[0]["threads"]
    print(f"{options.rounds} rounds, {threads} threads, {len(prompt)} + {options.decode} tokens")
    print(format_table(summary))
    if tokenizer:
        for name, rounds in results.items():
            print(f"{name} wrote: {decode_text(tokenizer, rounds[0]['tokens'])!r}")
    return {"threads": threads, "rounds": results, **summary}


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

    text: str = Tokenizer.from_file(tokenizer).decode(list(tokens))
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that runs rounds."""
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=10, help="repetitions within a round")
    parser.add_argument("--threads", type=int, help="default: the runtime's own choice")
    parser.add_argument("--json", type=Path, help="also write everything to this file")


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write a report where `--json` says."""
    if path:
        path.write_text(json.dumps(report, indent=2) + "\n")
