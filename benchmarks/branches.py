"""Branches beside quantized weights: LoftQ by bits and rank, and RILQ at 2 bits.

python benchmarks/branches.py --text wikitext2_valid.txt --calibration c4.jsonl -o results.json

LoftQ (NormalFloat, groups of 64): the error of all weights and perplexity, beside quantization alone. RILQ: 2
bits in groups of 64 with zero points, to nearest, at ranks 16, 32 and 64; and the best 2-bit model, rotation,
GPTQ and RILQ. Rows that are in the results file already are not computed again.
"""

from __future__ import annotations

from typing import Any

import common

from rolora_passes import (
    RILQ,
    AddLoRA,
    FoldConstants,
    LoftQ,
    Pass,
    QuantizeWeights,
    apply_passes,
    history,
)
from rolora_passes.graphs.graph import site_names
from rolora_passes.loading.data import calibration_tokens
from rolora_passes.passes.base import Calibration
from rolora_passes.passes.loftq import bits_by_layer
from rolora_passes.recipes import load_recipe

BITS, RANKS = (4, 3, 2.5, 2), (8, 16, 32, 64)


class Branches(common.Bench):
    """Rows of LoftQ, and of RILQ."""

    def loftq(self) -> None:
        for bits in BITS:
            for rank in RANKS:
                self.row(f"loftq | {bits} | {rank}", [LoftQ(bits, 64, rank=rank), FoldConstants()], "loftq")
            self.row(f"nf | {bits}", self.plain(bits))

    def plain(self, bits: float) -> list[Pass]:
        """Quantization alone, every layer at the width that LoftQ gives it."""
        names, widths = site_names(self.graph), bits_by_layer(self.graph, bits)
        steps: list[Pass] = []
        for width in sorted(set(widths.values())):
            targets = tuple(name for node, name in names.items() if widths.get(node) == width)
            steps.append(QuantizeWeights(width, 64, grid="nf", head=None, targets=targets))
        return [*steps, FoldConstants()]

    def rilq(self) -> None:
        rtn: list[Pass] = [
            QuantizeWeights(2, 64, symmetric=False, clip_search=True, head=None),
            FoldConstants(),
        ]
        rotated = list(load_recipe("quarot:W2A16"))
        for name, base in (("rtn", rtn), ("rotated gptq", rotated)):
            self.row(f"{name} | 2", base)
            for rank in (16, 32, 64) if name == "rtn" else (64,):
                self.row(f"rilq on {name} | 2 | {rank}", [*base, AddLoRA(rank=rank), self.tuning()], "rilq")

    def tuning(self) -> RILQ:
        o = self.options
        return RILQ(steps=o.steps, batch=o.batch, lr=o.lr, bfloat16=True, evaluate_every=-(-o.steps // 4))

    def row(self, key: str, passes: list[Pass], noted: str | None = None) -> None:
        o = self.options
        if key in self.found or not self.wanted(key):
            return
        tokens = calibration_tokens(o.calibration, self.tokenizer, o.samples, o.length)
        graph = apply_passes(self.graph, passes, verify=False, calibration=Calibration(tokens, o.work))
        row: dict[str, Any] = {"ppl": self.perplexity(graph)}
        for record in history(graph):
            if record.name == noted:
                notes = dict(record.report.notes)
                losses = notes.pop("losses", None)
                row |= notes | ({"losses": [losses[0], losses[-1]]} if losses else {})
        self.keep(key, row)


def main() -> None:
    parser = common.bench_options(__doc__ or "", "build/branches.json")
    parser.add_argument("--samples", type=int, default=320, help="windows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    bench = Branches(parser.parse_args())
    bench.loftq()
    bench.rilq()


if __name__ == "__main__":
    main()
