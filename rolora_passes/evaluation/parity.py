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
    start, steps = length // 2, 2 + len(manifest["targets"])
    expected, found = GraphScorer(model).logits(tokens)[0], GraphScorer(graph)
    on_progress("compare", 1, steps)
    quantized = found.logits(tokens)[0]
    on_progress("compare", 2, steps)
    new = min(_NEW, start)
    rows = [_row("quantized graph", quantized, expected, quantized, tokens[0]) | {"greedy": new, "of": new}]
    for number, name in enumerate(manifest["targets"]):
        program = open_program(folder, name)
        row = _row(name, program.logits(tokens)[0], expected, quantized, tokens[0])
        written = _greedy(program, tokens[:, :start], new)
        rows.append(row | {"greedy": _agreeing(found, written, start), "of": new})
        on_progress("compare", number + 3, steps)
    return rows


def _greedy(scorer: Scorer, tokens: Tensor, new: int) -> Tensor:
    """Tokens int64 [1, S] and the `new` ones that follow, each the likeliest."""
    for _ in range(new):
        following = scorer.logits(tokens, tokens.shape[1] - 1)[:, -1].argmax(-1)
        tokens = torch.cat([tokens, following[None]], 1)
    return tokens


def _agreeing(graph: Scorer, written: Tensor, start: int) -> int:
    """How many tokens from `start` on are what the graph would have written.

    One call tells: up to the first that is not, the graph would have read the same text.
    """
    own = graph.logits(written[:, :-1], start - 1)[0].argmax(-1)
    return int((own == written[0, start:]).cumprod(0).sum())


def _row(name: str, logits: Tensor, expected: Tensor, quantized: Tensor, tokens: Tensor) -> dict[str, Any]:
    count = len(tokens)
    kl, _, top1 = compare_logits(logits, expected, tokens)
    kl_graph, _, top1_graph = compare_logits(logits, quantized, tokens)
    return {
        "name": name, "tokens": count, "kl": kl / count, "top1": top1 / count,
        "kl_graph": kl_graph / count, "top1_graph": top1_graph / count,
    }  # fmt: skip
