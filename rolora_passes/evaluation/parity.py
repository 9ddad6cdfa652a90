"""Twin parity: one model as captured, as quantized, and in every runtime, on the same real text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.evaluation.scorers import GraphScorer, ProgramScorer, Scorer
from rolora_passes.evaluation.sensitivity import compare_logits
from rolora_passes.export.folder import read_manifest
from rolora_passes.graphs.info import info

SAMPLE = Path(__file__).with_name("sample.txt")
_TOKENS, _NEW = 64, 16
_JUDGED = 256  # tokens; fewer make figures that vary by a half
_UNNOTICED = 0.1  # nats a token: a model that says next to nothing has little to lose


@dataclass(frozen=True)
class Loss:
    """What a quantized graph lost of a model, on a text.

    Attributes:
        tokens: of the text.
        kl: divergence of its predictions from the model's, nats per token.
        said: the information in the model's own predictions: their divergence from their mean over the text,
            which is the best guess that does not look at the text; nats per token.
        top1: the part of the tokens whose likeliest next token is the model's.
        perplexity: of the text, over the model's.
    """

    tokens: int
    kl: float
    said: float
    top1: float
    perplexity: float

    @property
    def part(self) -> float:
        """The part of it that is lost; above 1, a guess without the text is nearer to the model."""
        if self.kl < _UNNOTICED:
            return 0.0
        return self.kl / max(self.said, _UNNOTICED) if math.isfinite(self.kl) else math.inf

    def row(self) -> dict[str, Any]:
        """JSON; a figure that is not finite is None."""
        known = asdict(self) | {"part": self.part}
        plain = {name: value if math.isfinite(value) else None for name, value in known.items()}
        return plain | {"summary": str(self)}

    def __str__(self) -> str:
        """A line for people."""
        return (
            f"it loses {self._amount()} of the information in the model's predictions on {self.tokens} "
            f"tokens of text (KL {self.kl:.2f} of {self.said:.2f} nats per token); top-1 agreement "
            f"{self.top1:.0%}, perplexity {self.perplexity:.3g} times the model's"
        )

    def _amount(self) -> str:
        if max(self.kl, self.said) < _UNNOTICED:
            return "less than can be told"  # for the model itself says next to nothing
        part = self.part or self.kl / self.said
        if part < 0.005:
            return "less than 1%"
        return f"{part:.0%}" if part <= 1 else "more than all"


def sample_text(graph: fx.GraphModule, tokenizer: Any, most: int = _JUDGED) -> Tensor:
    """The first tokens of some English text, int64 [1, S], as many as a model has positions for."""
    most = min(most, info(graph).config.get("max_position_embeddings") or most)
    return torch.tensor([tokenizer(SAMPLE.read_text("utf-8")).input_ids[:most]])


def measure_loss(model: fx.GraphModule, graph: fx.GraphModule, tokens: Tensor) -> Loss:
    """What a quantized graph lost of the model that it was made of, on tokens int64 [1, S]."""
    expected, found = (GraphScorer(g).logits(tokens)[0] for g in (model, graph))
    kl, nll, same = compare_logits(found, expected, tokens[0])
    mean = (sum(row.float().softmax(-1) for row in expected) / len(expected)).log()
    said, _, _ = compare_logits(mean.expand(expected.shape), expected, tokens[0])
    count = tokens.shape[1]
    growth = nll / max(count - 1, 1)
    return Loss(count, kl / count, said / count, same / count, math.exp(growth) if growth < 700 else math.inf)


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
        program = ProgramScorer(folder, name)
        row = _row(name, program.logits(tokens)[0], expected, quantized, tokens[0])
        written = _greedy(program, tokens[:, :start], new)
        del program  # its weights and the graph's need not be in memory at once
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
    own = graph.logits(written[:, :-1], start - 1)[0].argmax(-1).cpu()
    return int((own == written[0, start:]).cumprod(0).sum())


def _row(name: str, logits: Tensor, expected: Tensor, quantized: Tensor, tokens: Tensor) -> dict[str, Any]:
    count = len(tokens)
    kl, _, top1 = compare_logits(logits, expected, tokens)
    kl_graph, _, top1_graph = compare_logits(logits, quantized, tokens)
    return {
        "name": name, "tokens": count, "kl": kl / count, "top1": top1 / count,
        "kl_graph": kl_graph / count, "top1_graph": top1_graph / count,
    }  # fmt: skip
