"""Perplexity of a text, and the divergence of two models' predictions.

Perplexity is token level, by the protocol of GPTQ, QuaRot and SpinQuant: the token stream is cut into windows
that do not overlap, an incomplete last window is dropped, and every token of a window but the first is
predicted from those before it in the window. Perplexity is exp of the mean loss over all predicted tokens.
(Their code averages the windows' means weighted by length, which is the same.) If the tokenizer begins a text
with BOS, every window here begins with it; in their code only the first one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rolora_passes.errors import DataError, EvaluationError
from rolora_passes.evaluation.scorers import Scorer, require_known, require_window
from rolora_passes.evaluation.sensitivity import compare_logits
from rolora_passes.loading.data import cut_windows

PROTOCOL = (
    "token-level perplexity: windows that do not overlap, tail dropped, each begun as the tokenizer begins a "
    "text, each token of a window but the first predicted from those before it in the window"
)
_ROWS = 128  # positions whose log-probabilities are held at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` found.

    Attributes:
        value: exp(nll).
        nll: mean negative log-likelihood, nats per token.
        nll_error: standard error of nll over windows; None if there is only one.
        tokens: tokens predicted, windows * (window - 1).
    """

    value: float
    nll: float
    nll_error: float | None
    tokens: int
    windows: int
    window: int
    seconds: float

    @property
    def error(self) -> float | None:
        """Standard error of the perplexity over windows, to first order."""
        return None if self.nll_error is None else self.value * self.nll_error


@dataclass(frozen=True)
class Divergence:
    """What `divergence` found: KL(a || b) in nats per token, and top-1 agreement from 0 to 1."""

    kl: float
    agreement: float
    tokens: int


def perplexity(
    scorer: Scorer,
    tokens: Tensor,
    window: int = 2048,
    limit: int | None = None,
    on_progress: Progress | None = None,
    begin: Sequence[int] = (),
) -> Perplexity:
    """Perplexity of a token stream int64 [n]; see this module for the protocol.

    Args:
        window: tokens in a window.
        limit: the number of windows, from the start; None for all.
        begin: the special tokens that the stream begins with; every window begins with them.
        on_progress: called with the windows done and their number.

    Raises:
        DataError: less than one window of text, or tokens outside the model's vocabulary.
        EvaluationError: windows longer than the model's context, or logits that are not finite.
    """
    windows = split_windows(scorer, tokens, window, limit, begin)
    start, losses = time.perf_counter(), []
    for number, row in enumerate(windows):
        losses.append(_loss(scorer, row))
        if on_progress:
            on_progress(number + 1, len(windows))
    each = torch.tensor(losses, dtype=torch.float64)
    nll, count = float(each.mean()), len(losses)
    error = float(each.std() / math.sqrt(count)) if count > 1 else None
    value = math.exp(nll) if nll < 700 else math.inf
    return Perplexity(value, nll, error, count * (window - 1), count, window, time.perf_counter() - start)


def split_windows(
    scorer: Scorer, tokens: Tensor, window: int, limit: int | None, begin: Sequence[int] = ()
) -> Tensor:
    """The windows int64 [N, window] to score; see `loading.data.cut_windows`.

    Raises:
        DataError, EvaluationError: see `perplexity`.
    """
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise DataError(f"expected a stream of tokens int64 [n], found {tokens.dtype} {list(tokens.shape)}")
    own = len(begin)
    if window < 2 + own or (limit is not None and limit < 1):
        raise EvaluationError(
            f"expected windows of at least {2 + own} tokens and at least 1 of them, found window {window}, "
            f"{limit}"
        )
    require_window(scorer, window)
    count = (len(tokens) - own) // (window - own)
    if count < 1:
        raise DataError(
            f"expected a text of at least one window, {window} tokens, found {len(tokens)}: "
            "give more text, or a smaller --window"
        )
    require_known(scorer, tokens)
    return cut_windows(tokens, torch.arange(count)[:limit] * (window - own), window, begin)


def divergence(a: Scorer, b: Scorer, windows: Tensor, on_progress: Progress | None = None) -> Divergence:
    """KL(a || b) and top-1 agreement over all tokens of windows int64 [N, S]."""
    for scorer in (a, b):
        require_window(scorer, windows.shape[1])
        require_known(scorer, windows)
    kl, same = 0.0, 0
    for number, row in enumerate(windows):
        one, _, equal = compare_logits(b.logits(row[None])[0], a.logits(row[None])[0], row)
        kl, same = kl + one, same + equal
        if on_progress:
            on_progress(number + 1, len(windows))
    return Divergence(kl / windows.numel(), same / windows.numel(), windows.numel())


def _loss(scorer: Scorer, row: Tensor) -> float:
    """Mean negative log-likelihood of a window's tokens [S], except the first."""
    total, logits = 0.0, scorer.logits(row[None, :-1])[0]
    targets = row[1:].to(logits.device)
    for chunk, target in zip(_chunks(logits), targets.split(_ROWS), strict=True):
        picked = chunk.gather(-1, target[:, None]).squeeze(-1)
        total += float((chunk.logsumexp(-1) - picked).cpu().sum(dtype=torch.float64))
    if not math.isfinite(total):
        raise EvaluationError(
            "expected finite logits, found NaN or infinite ones: the cause is the model, its recipe or its "
            "precision (--dtype)"
        )
    return total / len(targets)


def _chunks(logits: Tensor) -> Iterator[Tensor]:
    """Rows of logits [S, V] in float32 or better, in chunks, so that no second copy of all is made."""
    for chunk in logits.split(_ROWS):
        yield chunk if chunk.dtype == torch.float64 else chunk.float()
