"""Time the fast Hadamard transform of a weight against the dense product, in one run.

    python benchmarks/hadamard.py [--rows 4096] [--columns 14336] [--dense-rows 64] [--repeats 5]

The dense product of a whole 4096 x 14336 weight is 1.7e12 flops, so it is timed on the first
`--dense-rows` rows; ratios compare time per row. Times are the best of `--repeats`.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch

from rolora_passes.numerics import hadamard


def best_time(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--dense-rows", type=int, default=64, help="rows of the dense product that is timed")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows, columns = options.rows, options.columns

    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    sample = weight[: options.dense_rows].double()
    matrix = hadamard.matrix(columns).double()
    reference = sample @ matrix / columns**0.5
    dense = best_time(lambda: sample.double() @ matrix, min(2, options.repeats)) / len(sample)

    print(f"{hadamard.describe(columns)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, best of {options.repeats}")
    print(f"dense float64 product: measured on {len(sample)} rows, {dense * 1e3:.2f} ms per row;")
    print(f"{rows} rows would take {dense * rows:.1f} s (scaled per row, not measured)\n")
    print(
        f"{'fast transform':<36}{'seconds':>9}{'ms / row':>10}{'dense / fast per row':>22}{'max error':>11}"
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        w = weight.to(dtype)
        seconds = best_time(functools.partial(hadamard.transform, w, columns), options.repeats)
        error = (hadamard.transform(w[: len(sample)], columns) - reference).abs().max().item()
        ratio = f"{dense * rows / seconds:.0f}x"
        label = f"{rows} x {columns} {dtype}".replace("torch.", "")
        print(f"{label:<36}{seconds:>9.3f}{seconds / rows * 1e3:>10.4f}{ratio:>22}{error:>11.1e}")
    order = hadamard.largest_order(rows)
    for dtype in (torch.float32, torch.float64):
        call = functools.partial(hadamard.transform, weight.to(dtype), order, 0)
        label = f"the same, order {order} on axis 0, {dtype}".replace("torch.", "")
        print(f"{label:<36}{best_time(call, options.repeats):>9.3f}")


if __name__ == "__main__":
    main()
