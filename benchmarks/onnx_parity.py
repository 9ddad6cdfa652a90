"""ONNX against the graph it came from: to rounding, at int8, over 2,000 generated tokens, in padded batches.

python benchmarks/onnx_parity.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import captured, compare, options, tokens_of
from torch import Tensor, fx

from rolora_passes import apply_passes
from rolora_passes.export.onnx.lower import to_onnx
from rolora_passes.export.onnx.runner import OnnxProgram
from rolora_passes.graphs import run
from rolora_passes.passes.base import Pass
from rolora_passes.recipes import load_recipe


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--recipes", nargs="+", default=["8da4w", "rotated-8da4w"])
    parser.add_argument("--generate", type=int, default=2000, help="tokens to generate (%(default)s)")
    arguments = parser.parse_args()
    graph, tokenizer = captured(arguments.model)
    tokens = tokens_of(tokenizer, arguments.text, 64)
    with tempfile.TemporaryDirectory() as folder:
        for recipe, passes in _recipes(arguments.recipes):
            weights = [p for p in passes if p.name != "quantize-activations"]
            for flavor in ("ort", "portable"):
                exact = apply_passes(graph, weights, verify=False)
                _rounding(exact, Path(folder) / "exact", flavor, recipe, tokens)
                rounded = apply_passes(graph, passes, verify=False)
                _int8(rounded, graph, Path(folder) / "int8", flavor, recipe, tokens)
        _drift(exact, Path(folder) / "long", tokens[:, :32], arguments.generate)
        _batches(rounded, Path(folder) / "batch", tokenizer)


def _recipes(names: list[str]) -> Iterator[tuple[str, list[Pass]]]:
    """Recipes by name; those with online Hadamards also without them."""
    for name in names:
        passes = load_recipe(name)
        without = [p for p in passes if p.name != "insert-hadamard"]
        if len(without) < len(passes):
            yield f"{name} without R4", without
        yield name, passes


def _rounding(graph: fx.GraphModule, folder: Path, flavor: Any, recipe: str, tokens: Tensor) -> None:
    to_onnx(graph, folder, flavor, max_length=128, last_token=False)
    found, expected = OnnxProgram(folder)(tokens, 0), run(graph, tokens)
    worst = float((found - expected).abs().max())
    print(f"{recipe}, {flavor}, float activations: largest difference of a logit {worst:.1e}", flush=True)


def _int8(
    graph: fx.GraphModule, model: fx.GraphModule, folder: Path, flavor: Any, recipe: str, tokens: Tensor
) -> None:
    to_onnx(graph, folder, flavor, max_length=128, last_token=False)
    found = OnnxProgram(folder)(tokens, 0)
    for name, other in (("its graph", graph), ("the float model", model)):
        kl, top = compare(found, run(other, tokens))
        print(
            f"{recipe}, {flavor}, int8 activations, against {name}: KL {kl:.2e}, top-1 {top:.1%}", flush=True
        )


def _drift(graph: fx.GraphModule, folder: Path, tokens: Tensor, count: int) -> None:
    """Greedy tokens through the caches one by one, then all of them through the graph at once."""
    to_onnx(graph, folder, max_length=tokens.shape[1] + count)
    program, steps = OnnxProgram(folder), []
    logits, known = program(tokens, 0), tokens
    for _ in range(count):
        steps.append(logits[:, -1])
        known = torch.cat([known, logits[:, -1].argmax(-1)[None]], 1)
        logits = program(known[:, -1:], known.shape[1] - 1)
    found, expected = torch.cat(steps), run(graph, known[:, :-1])[0, tokens.shape[1] - 1 :]
    for start in range(0, count, 500):
        a, b = found[start : start + 500], expected[start : start + 500]
        same = float((a.argmax(-1) == b.argmax(-1)).float().mean())
        worst = float((a - b).abs().max())
        print(
            f"tokens {start} to {start + len(a)}: largest difference {worst:.1e}, likeliest token {same:.1%}"
        )


def _batches(graph: fx.GraphModule, folder: Path, tokenizer: Any) -> None:
    """Four prompts of different lengths through onnxruntime-genai, together and one by one."""
    import onnxruntime_genai as genai

    to_onnx(graph, folder, max_length=128, tokenizer=tokenizer)
    model = genai.Model(str(folder))
    texts = ("The sea", "She wrote a letter to her brother in the city", "Paris", "Water boils at a hundred")
    prompts = [tokenizer(text).input_ids for text in texts]
    longest = max(map(len, prompts))
    padding = json.loads((folder / "genai_config.json").read_text())["model"]["pad_token_id"]
    together = _generate(genai, model, prompts, longest + 24, padding)
    for prompt, row in zip(prompts, together, strict=True):
        alone = _generate(genai, model, [prompt], len(prompt) + 24, padding)[0][len(prompt) :]
        count = sum(a == b for a, b in zip(alone, row[longest:], strict=False))
        print(f"batch of 4, a prompt of {len(prompt)}: {count} of 24 tokens as alone")


def _generate(genai: Any, model: Any, prompts: list[list[int]], length: int, padding: int) -> list[list[int]]:
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    longest = max(map(len, prompts))
    rows = [prompt + [padding] * (longest - len(prompt)) for prompt in prompts]
    generator.append_tokens(np.array(rows, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [list(generator.get_sequence(i)) for i in range(len(prompts))]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
