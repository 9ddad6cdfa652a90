"""RoLoRA against LoRA at one budget: held-out loss, perplexity and task accuracy after rounding.

python benchmarks/rolora.py --data alpaca.jsonl --text wikitext2_valid.txt --calibration c4.jsonl \
    --tasks piqa.jsonl,arc_easy.jsonl -o results.json

LoRA without rotation, after it (RoLoRA) and before it (LBR) are trained on the same windows in the same
order; 10 % of the windows are held out. Each is then merged and rounded at every setting. Rows that are in
the results file already are not computed again; --work keeps what was trained.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import common
from torch import fx
from torch.nn import functional as F

from rolora_passes import TuneLoRA, apply_passes, history
from rolora_passes.evaluation.scorers import GraphScorer
from rolora_passes.evaluation.tasks import evaluate_tasks
from rolora_passes.graphs.running import run
from rolora_passes.loading.data import calibration_tokens
from rolora_passes.loading.instructions import IGNORED, instruction_windows
from rolora_passes.passes.base import Calibration
from rolora_passes.passes.setting import Setting, quantizers
from rolora_passes.recipes import load_recipe

# No name is a part of another, so that --rows can choose each.
METHODS = {"LoRA without rotation": "lora", "RoLoRA": "rolora", "LoRA before rotation": "rolora-lbr"}
SETTINGS = ("W4A4", "W6A6")


class Tuned(common.Bench):
    """Rows of what LoRA trains, rounded."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.tokens, self.labels = instruction_windows(options.data, self.tokenizer, options.length)

    def tuned(self, method: str) -> fx.GraphModule:
        """The model with what the method trained merged, in floating point."""
        o = self.options
        passes = load_recipe(f"{METHODS[method]}:W16A16")
        steps = round(o.epochs * len(self.tokens) * 0.9 / o.batch)
        passes = [
            dataclasses.replace(p, steps=steps, batch=o.batch, lr=o.lr, evaluate_every=-(-steps // 2))
            if isinstance(p, TuneLoRA)
            else p
            for p in passes
        ]
        data = Calibration(self.tokens, o.work, labels=self.labels)
        graph = apply_passes(self.graph, passes, verify=False, calibration=data)
        (notes,) = [r.report.notes for r in history(graph) if r.name == "tune-lora"]
        kept = {k: notes[k] for k in ("seconds", "peak_mb", "validation", "best")}
        self.found[f"{method} | learning"] = {
            **kept,
            "first": notes["losses"][0],
            "last": notes["losses"][-1],
        }
        return graph

    def rows(self) -> None:
        """Every cell that is not there yet."""
        self.measure("float", self.graph)
        for method in METHODS:
            cells = [f"{method} | {r} | {s}" for s in SETTINGS for r in ("rtn", "gptq")]
            if all(c in self.found for c in cells) or not self.wanted(method):
                continue
            graph = self.tuned(method)
            self.measure(f"{method} | float", graph)
            for cell in cells:
                if cell not in self.found:
                    _, rounding, setting = cell.split(" | ")
                    passes = quantizers(Setting.parse(setting), rounding)
                    windows = calibration_tokens(self.options.calibration, self.tokenizer, 64, 256)
                    rounded = apply_passes(graph, passes, verify=False, calibration=Calibration(windows))
                    self.measure(cell, rounded)

    def measure(self, key: str, graph: fx.GraphModule) -> None:
        if key in self.found:
            return
        scorer, o = GraphScorer(graph), self.options
        row: dict[str, Any] = {"held_out": self.held_out(graph), "ppl": self.perplexity(graph)}
        if o.tasks:
            with self.evaluating():
                found = evaluate_tasks(scorer, self.tokenizer, o.tasks.split(","), o.task_limit, 0)["tasks"]
                row["tasks"] = {k: (v["acc"], v["acc_stderr"]) for k, v in found.items()}
        self.keep(key, row)

    def held_out(self, graph: fx.GraphModule) -> float:
        """Cross-entropy of the answers in the windows that were not trained on, nats per token."""
        count = -(-len(self.tokens) // 10)
        total, tokens = 0.0, 0
        for rows, labels in zip(self.tokens[-count:].split(4), self.labels[-count:].split(4), strict=True):
            with self.evaluating():
                logits = run(graph, rows)[:, :-1].flatten(0, 1).float()
            wanted = labels[:, 1:].flatten()
            total += float(F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
            tokens += int((wanted != IGNORED).sum())
        return total / tokens


def table(found: dict[str, Any]) -> str:
    """Markdown: a row for every model that was measured."""
    tasks = list(next((r["tasks"] for r in found.values() if "tasks" in r), {}))
    head = ["", "held-out loss", "perplexity", *tasks]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key, row in found.items():
        if "ppl" in row:
            accuracies = [f"{a:.3f} ± {e:.3f}" for a, e in row.get("tasks", {}).values()]
            cells = [key.replace(" |", ","), f"{row['held_out']:.3f}", f"{row['ppl']:.2f}", *accuracies]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = common.bench_options(__doc__ or "", "build/rolora.json")
    parser.add_argument("--data", required=True, help="instructions, .jsonl in Alpaca's format")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tasks", help="task files or names, comma-separated")
    parser.add_argument("--task-limit", type=int, default=200)
    bench = Tuned(parser.parse_args())
    bench.rows()
    print(table(bench.found))


if __name__ == "__main__":
    main()
