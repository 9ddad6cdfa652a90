"""Seconds and peak memory of tracking errors, beside plain forward passes of the same graphs, in one run."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from common import captured, options, tokens_of
from passes import Peak, resident_mb

from rolora_passes.debugging import track_errors, with_float_twin
from rolora_passes.graphs.running import run
from rolora_passes.recipes import load_recipe


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, MB of resident memory above what there was before)."""
    ctypes.CDLL(None).malloc_trim(0)  # or what the last one freed would count as there before (glibc)
    before, start = resident_mb(), time.perf_counter()
    with Peak() as peak:
        work()
    return time.perf_counter() - start, peak.mb - before


def main() -> None:
    """Print the figures, round by round and their medians."""
    parser = options(__doc__ or "")
    parser.add_argument("--recipe", default="rotated-8da4w")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    graph, tokenizer = captured(arguments.model)
    tokens = tokens_of(tokenizer, arguments.text, arguments.tokens)
    twin, quantized = with_float_twin(graph, load_recipe(arguments.recipe), verify=False)
    del graph
    work: dict[str, Callable[[], object]] = {
        "float twin": lambda: run(twin, tokens),
        "quantized": lambda: run(quantized, tokens),
        "tracking": lambda: track_errors(quantized, twin, tokens),
    }
    print(f"{arguments.recipe}, {tokens.numel()} tokens, {torch.get_num_threads()} threads")
    for step in work.values():
        step()
    rounds = [{name: measured(step) for name, step in work.items()} for _ in range(arguments.rounds)]
    for name in work:
        seconds, mb = (statistics.median(r[name][i] for r in rounds) for i in (0, 1))
        print(f"  {name:12}{seconds:8.3f} s{mb:8.0f} MB more")
    for name in ("float twin", "quantized"):
        ratios = sorted(r["tracking"][0] / r[name][0] for r in rounds)
        middle = statistics.median(ratios)
        print(f"  tracking / {name}: x{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
