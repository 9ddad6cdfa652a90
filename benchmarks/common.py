"""What the benchmarks share: the model, a text, comparisons of logits, and what a command costs."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from rolora_passes.evaluation.parity import SAMPLE
from rolora_passes.evaluation.perplexity import perplexity
from rolora_passes.evaluation.scorers import GraphScorer
from rolora_passes.files import writing
from rolora_passes.graphs import capture
from rolora_passes.loading.data import load_text, token_stream
from rolora_passes.loading.models import load_model
from rolora_passes.loading.tokens import beginning


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model", help="model folder, hub name or .gguf (default: the packaged SmolLM2-135M)"
    )
    parser.add_argument("--text", type=Path, default=SAMPLE, help="real text to read")
    return parser


def bench_options(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the options of a `Bench`."""
    parser = options(description)
    parser.add_argument("--calibration", required=True, help="text that passes look at and learn from")
    parser.add_argument("--windows", type=int, default=8, help="windows of 2048 tokens of the text")
    parser.add_argument("--bfloat16", action="store_true", help="evaluate in bfloat16, by torch's autocast")
    parser.add_argument("--rows", help="only rows whose name has all of these in it, comma-separated")
    parser.add_argument("--work", type=Path, help="keep what was learned there, to go on if interrupted")
    parser.add_argument("-o", "--output", type=Path, default=Path(output))
    return parser


def captured(source: str | None) -> tuple[fx.GraphModule, Any]:
    """The model as a graph, and its tokenizer."""
    if source is None:
        from packaged_model import packaged_model

        source = str(packaged_model())
    model, tokenizer = load_model(source)
    return capture(model), tokenizer


def tokens_of(tokenizer: Any, text: Path, length: int) -> Tensor:
    """The first tokens of a text, int64 [1, length]."""
    found: Tensor = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :length]
    return found


class Bench:
    """A model, a text to measure perplexity on, and rows by name that are kept in a file as they come.

    A row that is there already need not be computed again, so a run that was stopped goes on.
    """

    def __init__(self, options: Any) -> None:
        """Args:
        options: of `bench_options`.
        """
        self.options = options
        self.graph, self.tokenizer = captured(options.model)
        self.stream = token_stream(load_text(str(options.text)), self.tokenizer)
        self.begin = beginning(self.tokenizer)
        self.found = json.loads(options.output.read_text()) if options.output.is_file() else {}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, in the precision of the options."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.options.bfloat16):
            yield

    def perplexity(self, graph: fx.GraphModule) -> float:
        """Of the text, in windows of 2048 tokens."""
        with self.evaluating():
            return perplexity(
                GraphScorer(graph), self.stream, 2048, self.options.windows, begin=self.begin
            ).value

    def keep(self, key: str, row: dict[str, Any]) -> None:
        """Print a row and write it to the file."""
        self.found[key] = row
        print(key, row, flush=True)
        self.options.output.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.options.output) as temporary:
            temporary.write_text(json.dumps(self.found, indent=1))

    def wanted(self, row: str) -> bool:
        """Whether `rows` has no part, separated by commas, that is not in a row's name."""
        return self.options.rows is None or all(part in row for part in self.options.rows.split(","))


def compare(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(KL divergence of found from expected in nats per token, top-1 agreement) of logits [..., V]."""
    p, q = (torch.log_softmax(x.float(), -1) for x in (expected, found))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return kl, float((found.argmax(-1) == expected.argmax(-1)).float().mean())


def run_costing(command: list[str], folder: Path, log: Path) -> dict[str, float]:
    """Run a command in `folder`, what it prints going to `log`; return its seconds and peak memory.

    Raises:
        SystemExit: it failed; the message ends with what it printed last.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with log.open("w") as stream:
        status = subprocess.run(command, cwd=folder, stdout=stream, stderr=stream).returncode
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        last = "\n".join(log.read_text().splitlines()[-20:])
        sys.exit(f"{' '.join(command)} failed:\n{last}")
    return {
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_seconds": wall,
        # In KiB on Linux, and never below what this process held when it started the command.
        "peak_rss_mb": after.ru_maxrss / 1024,
    }
