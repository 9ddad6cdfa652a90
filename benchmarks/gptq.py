"""GPTQ of the whole model at 4 bits: seconds and memory, layer by layer, and where the time goes.

python benchmarks/gptq.py --calibration c4.jsonl --samples 32
"""

from __future__ import annotations

import re
import time

import common
import torch

from rolora_passes import FoldConstants, QuantizeWeights, apply_passes, history
from rolora_passes.loading.data import calibration_tokens


def main() -> None:
    parser = common.options(__doc__ or "")
    parser.add_argument("--calibration", required=True, help=".txt or .jsonl")
    parser.add_argument("--samples", type=int, default=32, help="windows of 2048 tokens")
    parser.add_argument("--group-size", type=int, default=None)
    options = parser.parse_args()
    graph, tokenizer = common.captured(options.model)
    tokens = calibration_tokens(options.calibration, tokenizer, options.samples)
    known = {"bits": 4, "group_size": options.group_size, "clip_search": True, "head": None}
    seconds = {}
    for method in ("rtn", "gptq"):
        start = time.perf_counter()
        done = apply_passes(
            graph, [QuantizeWeights(method=method, **known), FoldConstants()], calibration=tokens
        )
        seconds[method] = time.perf_counter() - start
    stages = history(done)[0].report.notes["stages"]
    layers: dict[str, list[dict[str, float]]] = {}
    for stage in stages:
        found = re.search(r"\d+", next(iter(stage["sites"])))
        layers.setdefault(found[0] if found else "", []).append(stage)
    print(f"{tokens.numel()} tokens, {torch.get_num_threads()} threads")
    print(f"{'layer':>6}{'forward + Hessian, s':>22}{'rounding, s':>14}{'peak, MB':>10}{'worst error':>13}")
    for name, parts in layers.items():
        forward, solve = (sum(p[k] for p in parts) for k in ("forward", "solve"))
        worst = max(e for p in parts for e in p["sites"].values())  # type: ignore[attr-defined]
        print(f"{name:>6}{forward:22.2f}{solve:14.2f}{parts[-1]['peak_mb']:10.0f}{worst**0.5:13.1%}")
    forward, solve = (sum(s[k] for s in stages) for k in ("forward", "solve"))
    print(f"{'all':>6}{forward:22.1f}{solve:14.1f}   whole pass {seconds['gptq']:.1f} s")
    print(f"rounding to nearest with the same clip search: {seconds['rtn']:.1f} s")


if __name__ == "__main__":
    main()
