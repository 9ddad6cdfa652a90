"""Twin parity: one model as captured, as quantized, and in every runtime, on the same real text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.evaluation.scorers import GraphScorer, Scorer, open_program, read_manifest
from rolora_passes.sensitivity import compare_logits

SAMPLE = Path(__file__).with_name("sample.txt")
_TOKENS, _NEW = 64, 16


def compare_programs(
    model: fx.GraphModule,
    graph: fx.GraphModule,
    folder: Path,
    tokenizer: Any,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[dict[str, Any]]:
    """Compare a model, its quantized graph, and the programs of a compiled folder on 64 tokens of English.

    Returns: a row for the graph and for every program: `name`; `kl` and `top1`, the divergence from the
        model in nats per token and the agreement of the likeliest token with it; `kl_graph` and
        `top1_graph`, the same against the graph; `greedy`, how many of `of` tokens that follow the first half
        of the text, each the likeliest, are the graph's before the first that is not.

    Raises:
        RunError: a program does not run.
    """
    manifest = read_manifest(folder)
    length = min(_TOKENS, manifest["max_length"])
    tokens = torch.tensor([tokenizer(SAMPLE.read_text("utf-8")).input_ids[:length]])
    known: dict[str, Callable[[], Scorer]] = {
        "model": lambda: GraphScorer(model),
        "quantized graph": lambda: GraphScorer(graph),
    }
    known |= {name: (lambda n=name: open_program(folder, n)) for name in manifest["targets"]}
    found: dict[str, tuple[Tensor, list[int]]] = {}
    for number, (name, open_) in enumerate(known.items()):
        scorer = open_()
        found[name] = scorer.logits(tokens)[0], _greedy(scorer, tokens[:, : length // 2])
        on_progress("compare", number + 1, len(known))
    return [_row(name, found, tokens[0]) for name in known if name != "model"]


def _greedy(scorer: Scorer, tokens: Tensor) -> list[int]:
    """The tokens that follow, each the likeliest."""
    start = tokens.shape[1]
    for _ in range(min(_NEW, start)):
        following = scorer.logits(tokens, tokens.shape[1] - 1)[:, -1].argmax(-1)
        tokens = torch.cat([tokens, following[None]], 1)
    new: list[int] = tokens[0, start:].tolist()
    return new


def _row(name: str, found: dict[str, tuple[Tensor, list[int]]], tokens: Tensor) -> dict[str, Any]:
    logits, greedy = found[name]
    count = len(tokens)
    kl, _, top1 = compare_logits(logits, found["model"][0], tokens)
    kl_graph, _, top1_graph = compare_logits(logits, found["quantized graph"][0], tokens)
    expected = found["quantized graph"][1]
    same = next((i for i, (a, b) in enumerate(zip(greedy, expected, strict=True)) if a != b), len(expected))
    return {
        "name": name, "tokens": count, "kl": kl / count, "top1": top1 / count, "kl_graph": kl_graph / count,
        "top1_graph": top1_graph / count, "greedy": same, "of": len(expected),
    }  # fmt: skip
