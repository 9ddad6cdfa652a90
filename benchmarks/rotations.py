"""Random rotations against learned ones: perplexity at W4A4KV4 and W4A8, RTN and GPTQ, on another text.

python benchmarks/rotations.py --text wikitext2_valid.txt --calibration c4.jsonl -o results.json

Rows are eight seeds of QuaRot's randomised Hadamards, and what learning makes of one of them (--seed), at one
budget of steps and tokens: SpinQuant (R1 and R2, Cayley SGD, cross-entropy), DartQuant and KurTail (R1 and
R2 layer by layer, from samples of activations), and the library's own (`learned:…`). That also balances
scalings, searches clips and learns scales of rounded weights and gains of norms: "learned, rounded" is before
this last step, and "scaled" (`scaled:…`) has everything but the learned rotation. --method and --lr compare
ways to move along the manifold, all else equal. A row that is in the results file already is not computed
again; --work keeps what was learned.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any, get_args

import common
from torch import fx

from rolora_passes import LearnRotation, LearnScales, QuantizeWeights, apply_passes, history
from rolora_passes.loading.data import calibration_tokens
from rolora_passes.numerics.stiefel import Method
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.setting import Setting, quantizers
from rolora_passes.recipes import load_recipe

SETTINGS = ("W4A4KV4", "W4A8")
ROUNDING = ("rtn", "gptq")
SEEDS = 8


class Rotations(common.Bench):
    """Rows of random rotations, and of learned ones."""

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
            exact = apply_passes(self.graph, before, verify=False)
            weights = quantizers(Setting(weights=4), rounding)
            rounded = apply_passes(exact, weights, verify=False, calibration=self.gptq_windows())
            for setting, key in keys.items():
                rest = quantizers(dataclasses.replace(Setting.parse(setting), weights=16), rounding)
                self.measure(key, rounded, rest, [])

    def learned(self, method: str, rounding: str, setting: str) -> None:
        """A method's rotations, learned for one setting and one way of rounding; then its quantizers."""
        o = self.options
        name = f"{method}, seed {o.seed}" if o.seed else method
        name += "".join(f", {value}" for value in (o.method, o.lr) if value is not None)
        key, row = f"{name} | {rounding} | {setting}", f"{name} {rounding} {setting}"
        if key in self.found or not self.wanted(row):
            return
        passes = self.recipe(method, rounding, setting)
        end = next((i for i, p in enumerate(passes) if isinstance(p, QuantizeWeights)), len(passes))
        windows = self.windows(o.steps * o.batch, o.length, 1)
        graph = apply_passes(self.graph, passes[:end], verify=False, calibration=windows)
        notes = [r.report.notes for r in history(graph) if r.name == "learn-rotation"]
        self.rounded_and_measured(graph, passes[end:], name, f" | {rounding} | {setting}", notes)

    def recipe(self, method: str, rounding: str, setting: str) -> list[Pass]:
        """A method's passes, with the budgets of the options."""
        name = f"{method}-rtn" if rounding == "rtn" else method
        return [self.budgeted(p) for p in load_recipe(f"{name}:{setting}", self.options.seed)]

    def rounded_and_measured(
        self, exact: fx.GraphModule, passes: list[Pass], method: str, cell: str, notes: list[dict[str, Any]]
    ) -> None:
        """Weights rounded, their scales learned if the passes say so, then activations and cache."""
        place = next((i for i, p in enumerate(passes) if isinstance(p, LearnScales)), None)
        o, end = self.options, 2 if place is None else place  # quantize-weights, fold-constants
        graph = apply_passes(exact, passes[:end], verify=False, calibration=self.gptq_windows())
        if place is not None:
            self.measure(f"{method}, rounded{cell}", graph, passes[place + 1 :], notes)
            windows = dataclasses.replace(self.windows(o.scale_steps * o.batch, o.length, 2), reference=exact)
            graph = apply_passes(graph, [passes[place]], verify=False, calibration=windows)
            notes = [*notes, history(graph)[-1].report.notes]
            passes = passes[1:]
        self.measure(method + cell, graph, passes[end:], notes)

    def budgeted(self, step: Pass) -> Pass:
        if not isinstance(step, (LearnRotation, LearnScales)):
            return step
        o = self.options
        if isinstance(step, LearnScales):
            return dataclasses.replace(step, steps=o.scale_steps, batch=o.batch)
        method, lr = o.method or step.method, step.lr if o.lr is None else o.lr
        return dataclasses.replace(step, steps=o.steps, batch=o.batch, method=method, lr=lr)

    def gptq_windows(self) -> Calibration:
        return self.windows(self.options.samples, self.options.length, 0)

    def measure(self, key: str, graph: fx.GraphModule, rest: list[Pass], notes: list[dict[str, Any]]) -> None:
        rounded = apply_passes(graph, rest, verify=False, calibration=self.gptq_windows())
        about = [{**n, "losses": [n["losses"][0], n["losses"][-1]]} for n in notes]
        self.keep(key, {"ppl": self.perplexity(rounded), "learning": about})


def table(found: dict[str, Any]) -> str:
    """Markdown: the seeds' mean, spread and best, and every learned row."""
    columns = [f"{r} | {s}" for r in ROUNDING for s in SETTINGS]
    seeds = {
        c: [found[f"random {i} | {c}"]["ppl"] for i in range(SEEDS) if f"random {i} | {c}" in found]
        for c in columns
    }
    names = [f"random {i}" for i in range(SEEDS)]
    methods = dict.fromkeys(m for m in (k.split(" | ")[0] for k in found) if m not in names)
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
    parser = common.bench_options(__doc__ or "", "build/rotations.json")
    parser.add_argument("--samples", type=int, default=64, help="windows that GPTQ sees")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--scale-steps", type=int, default=24)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window to learn from")
    parser.add_argument("--seed", type=int, default=0, help="the random rotations that learning starts from")
    parser.add_argument("--method", choices=get_args(Method), help="of moving rotations, not the recipe's")
    parser.add_argument("--lr", type=float, help="of rotations, not the recipe's")
    bench = Rotations(parser.parse_args())
    for rounding in ROUNDING:
        bench.random(rounding)
        for method in ("scaled", "dartquant", "kurtail", "spinquant", "learned"):
            for setting in SETTINGS:
                bench.learned(method, rounding, setting)
    print(table(bench.found))


if __name__ == "__main__":
    main()
