"""Seconds and peak memory of the passes, from fuse-norm to quantized, beside capture's."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from common import options

from rolora_passes.graphs import capture
from rolora_passes.graphs.graph import parameters
from rolora_passes.loading.models import load_model
from rolora_passes.passes.manager import apply_passes, history
from rolora_passes.recipes import load_recipe


def resident_mb() -> float:
    """This process's resident memory, in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class Peak:
    """The highest resident memory while the block ran, sampled every 2 ms."""

    def __enter__(self) -> Peak:
        self.mb, self._running = resident_mb(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._running:
            self.mb = max(self.mb, resident_mb())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()


def main() -> None:
    """Print the figures."""
    parser = options(__doc__ or "")
    parser.add_argument("--recipe", default="rotated-8da4w")
    arguments = parser.parse_args()
    if arguments.model is None:
        from packaged_model import packaged_model

        arguments.model = str(packaged_model())
    import transformers  # noqa: F401  (its memory is not the model's)

    model, _ = load_model(arguments.model)
    start = time.perf_counter()
    graph = capture(model)
    capture_seconds = time.perf_counter() - start
    del model
    weights = sum({id(p): p.numel() * 4 for p in parameters(graph).values()}.values()) / 1e6
    before = resident_mb()
    start = time.perf_counter()
    with Peak() as peak:
        result = apply_passes(graph, load_recipe(arguments.recipe), verify=False)
    seconds = time.perf_counter() - start
    for record in history(result):
        print(f"  {record.name:22}{record.seconds:8.2f} s")
    print(f"passes {seconds:.1f} s, capture {capture_seconds:.1f} s: ratio {seconds / capture_seconds:.2f}")
    total = peak.mb - before + weights
    print(
        f"fp32 weights {weights:.0f} MB; with them, peak while the passes ran {total:.0f} MB "
        f"({total / weights:.2f} x the weights; the process without the model held {before - weights:.0f} MB)"
    )


if __name__ == "__main__":
    main()
