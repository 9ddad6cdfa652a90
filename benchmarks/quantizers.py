"""Perplexity and task accuracy of the quantization methods at the papers' settings, one table.

python benchmarks/quantizers.py --text wikitext2_valid.txt --calibration c4.jsonl -o results.json

Every row is a recipe (`rolora passes`), evaluated as `rolora eval --recipe ROW` does. Rows that are in the
results file already are not computed again, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch import fx

from rolora_passes import apply_passes
from rolora_passes.evaluation.perplexity import perplexity
from rolora_passes.evaluation.scorers import GraphScorer
from rolora_passes.evaluation.tasks import evaluate_tasks
from rolora_passes.files import writing
from rolora_passes.loading.data import calibration_tokens, load_text, token_stream
from rolora_passes.loading.tokens import beginning
from rolora_passes.memory import peak_mb
from rolora_passes.passes.base import Calibration
from rolora_passes.recipes import dump_recipe, load_recipe

SETTINGS = ("W4A16", "W4A4", "W4A4KV4", "W4A8", "W6A6", "W2A16")
METHODS = ("rtn", "smoothquant", "gptq", "quarot-rtn", "quarot")
RANDOM = ("gptq", "quarot-rtn", "quarot")  # by the calibration windows, the rotation, or both
Key = tuple[str, int]


def rows(seeds: int) -> list[Key]:
    """(recipe, seed) of every row, those that share their weights next to each other."""
    same_weights = (("W4A16", "W4A4", "W4A8"), ("W4A4KV4",), ("W6A6",), ("W2A16",))
    return [("float", 0)] + [
        (f"{method}:{setting}", seed)
        for seed in range(seeds)
        for method in METHODS
        if seed == 0 or method in RANDOM
        for settings in same_weights
        for setting in settings
    ]


class Recipes:
    """Applies recipes; what two recipes in a row have in common is done once."""

    def __init__(self, graph: fx.GraphModule, tokenizer: Any, options: Any) -> None:
        self.graph, self.tokenizer, self.options = graph, tokenizer, options
        self._done: tuple[Any, fx.GraphModule] = ((), graph)

    def apply(self, recipe: str, seed: int) -> fx.GraphModule:
        passes = load_recipe(recipe, seed)
        folded = [i for i, p in enumerate(passes) if p.name == "fold-constants"]
        weights = passes[: folded[-1] + 1] if folded else []
        if self._done[0] != (seed, dump_recipe(weights)):
            o = self.options
            tokens = calibration_tokens(o.calibration, self.tokenizer, o.samples, 2048, seed)
            self._done = ((), self.graph)  # let go of the last one first
            graph = apply_passes(self.graph, weights, verify=False, calibration=Calibration(tokens))
            self._done = ((seed, dump_recipe(weights)), graph)
        return apply_passes(self._done[1], passes[len(weights) :], verify=False)


def main() -> None:
    parser = common.options(__doc__ or "")
    parser.add_argument("--calibration", required=True, help="text that GPTQ and SmoothQuant look at")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 2048 tokens")
    parser.add_argument("--windows", type=int, default=None, help="windows of 2048 tokens (default: all)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tasks", default=None, help="tasks for the rows of --task-rows, comma-separated")
    parser.add_argument("--task-limit", type=int, default=None)
    parser.add_argument("--task-rows", default="float,rtn:W4A4KV4,quarot:W4A4KV4", help="comma-separated")
    parser.add_argument("--rows", default=None, help="only rows whose name has this in it")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/quantizers.json"))
    options = parser.parse_args()
    graph, tokenizer = common.captured(options.model)
    stream = token_stream(load_text(str(options.text)), tokenizer)
    recipes = Recipes(graph, tokenizer, options)
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for recipe, seed in rows(options.seeds):
        key = f"{recipe} seed {seed}"
        row = found.setdefault(key, {})
        tasks = options.tasks if recipe in options.task_rows.split(",") else None
        if (options.rows and options.rows not in recipe) or ("ppl" in row and (not tasks or "tasks" in row)):
            continue
        start = time.perf_counter()
        scorer = GraphScorer(recipes.apply(recipe, seed))
        row["quantize_seconds"] = round(time.perf_counter() - start, 1)
        if "ppl" not in row:
            result = perplexity(scorer, stream, 2048, options.windows, begin=beginning(tokenizer))
            row |= {"ppl": result.value, "nll": result.nll, "tokens": result.tokens}
            row["eval_seconds"] = round(result.seconds, 1)
        if tasks:
            row["tasks"] = evaluate_tasks(scorer, tokenizer, tasks.split(","), options.task_limit, 0)
        row["peak_mb"] = round(peak_mb())
        print(key, {k: v for k, v in row.items() if k != "tasks"}, flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with writing(options.output) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
    print(table(found, options.seeds))


def table(found: dict[str, Any], seeds: int) -> str:
    """Markdown: perplexity by method and setting, seeds side by side."""
    lines = [
        f"| method | {' | '.join(SETTINGS)} |",
        "|---" * (len(SETTINGS) + 1) + "|",
        f"| float | {_ppl(found, 'float', 1)}" + " |" * len(SETTINGS),
    ]
    for method in METHODS:
        each = [_ppl(found, f"{method}:{s}", seeds if method in RANDOM else 1) for s in SETTINGS]
        lines.append(f"| {method} | {' | '.join(each)} |")
    for key, row in found.items():
        for task, figures in row.get("tasks", {}).get("tasks", {}).items():
            each = [f"{m} {figures[m]:.3f} ± {figures[m + '_stderr']:.3f}" for m in ("acc", "acc_norm")]
            lines.append(f"{key}: {task}, {figures['examples']} examples: {', '.join(each)}")
    return "\n".join(lines)


def _ppl(found: dict[str, Any], recipe: str, seeds: int) -> str:
    values = [found.get(f"{recipe} seed {s}", {}).get("ppl") for s in range(seeds)]
    return " / ".join("" if v is None else f"{v:.2f}" if v < 1e4 else f"{v:.1e}" for v in values)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
