"""Random rotations against learned ones: perplexity at W4A4KV4 and W4A8, RTN and GPTQ, on another text.

python benchmarks/rotations.py --text wikitext2_valid.txt --calibration c4.jsonl -o results.json

Rows are eight seeds of QuaRot's randomised Hadamards, and what learn-rotation makes of seed 0, at one budget
of steps and tokens: SpinQuant (R1 and R2, Cayley SGD, cross-entropy), and the library's own (`learned:…`). A
row that is in the results file already is not computed again; --work keeps what was learned.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import common
import torch
from torch import fx

from rolora_passes import LearnRotation, apply_passes, history
from rolora_passes.data import calibration_tokens, load_text, token_stream
from rolora_passes.evaluation.perplexity import perplexity
from rolora_passes.evaluation.scorers import GraphScorer
from rolora_passes.graphs.files import writing
from rolora_passes.passes import Calibration, Pass
from rolora_passes.recipes import load_recipe
from rolora_passes.settings import Setting, quantizers

SETTINGS = ("W4A4KV4", "W4A8")
ROUNDING = ("rtn", "gptq")
SEEDS = 8


class Bench:
    """The model, the texts, and the results so far."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.graph, self.tokenizer = common.captured(options.model)
        self.stream = token_stream(load_text(str(options.text)), self.tokenizer)
        self.found = json.loads(options.output.read_text()) if options.output.is_file() else {}

    def windows(self, samples: int, length: int, seed: int) -> Calibration:
        found = calibration_tokens(self.options.calibration, self.tokenizer, samples, length, seed)
        return Calibration(found, self.options.work)

    def random(self, rounding: str) -> None:
        """Every seed at both settings, which share their weights (R3 cancels where no key is rounded)."""
        for seed in range(SEEDS):
            keys = {s: f"random {seed} | {rounding} | {s}" for s in SETTINGS}
            if all(key in self.found for key in keys.values()) or not self.wanted(
                f"random {seed} {rounding}"
            ):
                continue
            before = [p for p in load_recipe("quarot:W16A4KV4", seed) if not p.name.startswith("quantize")]
            rounded = self.rounded(apply_passes(self.graph, before, verify=False), rounding)
            for setting, key in keys.items():
                self.measure(key, rounded, setting, {})

    def learned(self, method: str, rounding: str, setting: str) -> None:
        """A method's rotations, learned for one setting and one way of rounding."""
        key = f"{method} | {rounding} | {setting}"
        if key in self.found or not self.wanted(f"{method} {rounding} {setting}"):
            return
        recipe = f"{method}-rtn:{setting}" if rounding == "rtn" else f"{method}:{setting}"
        passes = [self.budgeted(p) for p in load_recipe(recipe) if not p.name.startswith("quantize")]
        o = self.options
        graph = apply_passes(
            self.graph, passes, verify=False, calibration=self.windows(o.steps * o.batch, o.length, 1)
        )
        record = next(r for r in history(graph) if r.name == "learn-rotation")
        notes = {k: v for k, v in record.report.notes.items() if k != "losses"}
        losses = record.report.notes["losses"]
        self.measure(key, self.rounded(graph, rounding), setting, {**notes, "loss": [losses[0], losses[-1]]})

    def budgeted(self, step: Pass) -> Pass:
        if not isinstance(step, LearnRotation):
            return step
        return dataclasses.replace(step, steps=self.options.steps, batch=self.options.batch)

    def rounded(self, graph: fx.GraphModule, rounding: str) -> fx.GraphModule:
        windows = self.windows(self.options.samples, 2048, 0)
        return apply_passes(
            graph, quantizers(Setting(weights=4), rounding), verify=False, calibration=windows
        )

    def measure(self, key: str, graph: fx.GraphModule, setting: str, about: dict[str, Any]) -> None:
        rest = dataclasses.replace(Setting.parse(setting), weights=16)
        with torch.no_grad():
            scorer = GraphScorer(apply_passes(graph, quantizers(rest, "rtn"), verify=False))
            result = perplexity(scorer, self.stream, 2048, self.options.windows)
        self.found[key] = {"ppl": result.value, **about}
        print(key, self.found[key], flush=True)
        self.options.output.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.options.output) as temporary:
            temporary.write_text(json.dumps(self.found, indent=1))

    def wanted(self, row: str) -> bool:
        return self.options.rows is None or all(part in row for part in self.options.rows.split(","))


def table(found: dict[str, Any]) -> str:
    """Markdown: the seeds' mean, spread and best, and every learned row."""
    columns = [f"{r} | {s}" for r in ROUNDING for s in SETTINGS]
    seeds = {c: [found[k]["ppl"] for k in found if k.startswith("random") and k.endswith(c)] for c in columns}
    methods = dict.fromkeys(k.split(" | ")[0] for k in found if not k.startswith("random"))
    kinds = {
        "random, mean ± standard deviation": lambda v: (
            f"{statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}"
        ),
        "random, best": lambda v: f"{min(v):.2f}",
        "random, worst": lambda v: f"{max(v):.2f}",
    }
    head = [f"| | {' | '.join(c.replace(' |', ',') for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    rows = [[name, *(f(seeds[c]) if len(seeds[c]) > 1 else "" for c in columns)] for name, f in kinds.items()]
    for method in methods:
        cells = [found.get(f"{method} | {c}", {}).get("ppl") for c in columns]
        rows.append([method, *("" if cell is None else f"{cell:.2f}" for cell in cells)])
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    parser = common.options(__doc__ or "")
    parser.add_argument(
        "--calibration", required=True, help="text that GPTQ looks at and rotations learn from"
    )
    parser.add_argument("--samples", type=int, default=8, help="GPTQ's windows of 2048 tokens")
    parser.add_argument("--windows", type=int, default=8, help="windows of 2048 tokens of the text")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window to learn from")
    parser.add_argument("--rows", help="only rows whose name has all of these in it, comma-separated")
    parser.add_argument("--work", type=Path, help="keep what was learned there, to go on if interrupted")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/rotations.json"))
    bench = Bench(parser.parse_args())
    for rounding in ROUNDING:
        bench.random(rounding)
        for method in ("spinquant", "learned"):
            for setting in SETTINGS:
                bench.learned(method, rounding, setting)
    print(table(bench.found))


if __name__ == "__main__":
    main()
