"""A .pte's logits against the graph it came from, and both against the float model, on real text."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import captured, compare, options, tokens_of

from rolora_passes import apply_passes
from rolora_passes.export import to_executorch
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.graphs import run
from rolora_passes.loading.data import calibration_tokens
from rolora_passes.recipes import load_recipe


def main() -> None:
    """Print KL (nats per token) and top-1 agreement over 64 tokens, for each recipe."""
    parser = options(__doc__ or "")
    deployable = ("8da4w", "rotated-8da4w", "rotated-8da4w-tied", "rotated-8da4w-kv8", "rotated-gptq-8da4w")
    parser.add_argument("--recipes", nargs="+", default=deployable)
    parser.add_argument("--calibration", help="text for recipes with GPTQ; they are left out without it")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 2048 tokens")
    arguments = parser.parse_args()
    graph, tokenizer = captured(arguments.model)
    tokens = tokens_of(tokenizer, arguments.text, 64)
    expected = run(graph, tokens)
    print(f"{'recipe':22}{'compared':34}{'KL':>10}{'top-1':>8}")
    for recipe in arguments.recipes:
        passes, data = load_recipe(recipe), None
        if any(step.needs_calibration for step in passes):
            if arguments.calibration is None:
                print(f"{recipe:22}left out: it needs --calibration TEXT")
                continue
            data = calibration_tokens(arguments.calibration, tokenizer, arguments.samples)
        quantized = apply_passes(graph, passes, verify=False, calibration=data)
        fake = run(quantized, tokens)
        with tempfile.TemporaryDirectory() as folder:
            to_executorch(quantized, Path(folder) / "model.pte", max_length=128, last_token=False)
            forward = load_pte(Path(folder) / "model.pte")
            found = forward(tokens, torch.tensor([0]))
        for name, a, b in (
            (".pte against quantized graph", found, fake),
            ("quantized graph against float", fake, expected),
            (".pte against float", found, expected),
        ):
            kl, top = compare(a, b)
            print(f"{recipe:22}{name:34}{kl:10.2e}{top:8.1%}", flush=True)


if __name__ == "__main__":
    main()
