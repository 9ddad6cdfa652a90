"""Two ExecuTorch programs in one process, call by call: their ratio on a machine whose speed drifts.

    python benchmarks/alternate.py random=random.pte learned=learned.pte --tokenizer tokenizer.json

Each call of one is followed by the same call of the other, in the next repetition the other way round, and a
ratio is the geometric mean of these two: who is second finds the machine otherwise than who is first.
Printed: medians, of the ratios with their quartiles. Both are fed the same tokens. Absolute figures, load
times and memory: `bench_executorch.py`.
"""

from __future__ import annotations

import argparse
import math
from statistics import median, quantiles
from typing import Any

from bench_executorch import import_runtime, named_file
from rounds import Stopwatch, prompt_ids


def calls(prompt: tuple[int, ...], decode: int) -> list[tuple[tuple[int, ...], int]]:
    """Tokens and their position, call by call: a prompt, then single tokens."""
    tokens = prompt * (1 + -(-decode // len(prompt)))
    return [(prompt, 0)] + [((tokens[p],), p) for p in range(len(prompt), len(prompt) + decode)]


def alternating(methods: list[Any], work: list[tuple[tuple[int, ...], int]], repeats: int) -> list[Any]:
    """Wall seconds [repeats][calls] of each method; the first repetition warms up and is left out."""
    import torch

    seconds: list[list[list[float]]] = [[], []]
    for repeat in range(repeats + 1):
        watches = [Stopwatch(), Stopwatch()]
        for number, (tokens, position) in enumerate(work):
            inputs = (torch.tensor([tokens]), torch.tensor([position]))
            for which in (0, 1) if (number + repeat) % 2 else (1, 0):
                watches[which](methods[which].call, inputs, clone_outputs=False)
        if repeat:
            for kept, watch in zip(seconds, watches, strict=True):
                kept.append([wall for wall, _ in watch.times])
    return seconds


def report(
    label: str, base: list[list[float]], other: list[list[float]], names: list[str], tokens: int
) -> None:
    """One line of seconds [repeats][calls]: tokens a second, and how many times as many the second does."""
    rates = [tokens / median(s for calls in seconds for s in calls) for seconds in (base, other)]
    best = [tokens * len(seconds[0]) / sum(map(min, zip(*seconds, strict=True))) for seconds in (base, other)]
    ratios = [[a / b for a, b in zip(*calls, strict=True)] for calls in zip(base, other, strict=True)]
    turned = zip(ratios[::2], ratios[1::2], strict=True)
    both = [math.sqrt(a * b) for first, second in turned for a, b in zip(first, second, strict=True)]
    low, middle, high = quantiles(both, n=4)
    print(
        f"{label}: {names[0]} {rates[0]:.1f}, {names[1]} {rates[1]:.1f} tokens/s, at each call's best "
        f"{best[0]:.1f} and {best[1]:.1f}; {names[1]} is "
        f"{middle:.3f}x {names[0]} (quartiles {low:.3f} to {high:.3f}, {2 * len(both)} calls of each)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs=2, type=named_file, metavar="NAME=PATH", help="the two programs")
    parser.add_argument("--tokenizer", help="tokenizer.json, for a prompt of text")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded after it")
    parser.add_argument("--repeats", type=int, default=20, help="an even number")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.repeats < 4 or options.repeats % 2:
        parser.error(f"expected an even number of repeats, at least 4, found {options.repeats}")
    names = [name for name, _ in options.files]
    runtime = import_runtime(options.threads)
    programs = [runtime._load_program(path) for _, path in options.files]  # must outlive their methods
    methods = [program.load_method("forward") for program in programs]
    work = calls(prompt_ids(options.tokenizer, options.prompt), options.decode)
    base, other = alternating(methods, work, options.repeats)
    report("prefill", [r[:1] for r in base], [r[:1] for r in other], names, options.prompt)
    report("decode", [r[1:] for r in base], [r[1:] for r in other], names, 1)


if __name__ == "__main__":
    main()
