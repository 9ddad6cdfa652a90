"""A scorer as an lm-eval language model. Import this only where lm-eval is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from rolora_passes.errors import EvaluationError
from rolora_passes.evaluation.scorers import Scorer, require_known

Request = tuple[Any, list[int], list[int]]  # the texts, or None; tokens of the context; of the continuation
Window = tuple[tuple[int, ...], int]  # tokens, and from which position on their logits are asked for

_MAX_LENGTH = 2048  # lm-eval's own, for models that do not say
_MAX_NEW_TOKENS = 256  # lm-eval's own


class ScorerLM(TemplateLM):  # type: ignore[misc]
    """Handles tokens, truncation and special tokens as lm-eval's `HFLM` does.

    Contexts are truncated on the left to the model's length. Requests that need the same logits (one-token
    answers to one question) are computed once, and requests of similar length are batched if the scorer takes
    several rows.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: Any, on_progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        super().__init__()
        self.scorer, self.tokenizer = scorer, tokenizer
        self.max_length = scorer.max_length or _MAX_LENGTH
        self._on_progress = on_progress or (lambda name, done, total: None)

    @property
    def eot_token_id(self) -> int:
        found: int | None = self.tokenizer.eos_token_id
        if found is None:
            raise EvaluationError(
                "this task begins or ends texts with the tokenizer's end-of-text token, and it has none: "
                "give a --tokenizer that does"
            )
        return found

    @property
    def prefix_token_id(self) -> int:
        found: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, with the tokenizer's special tokens unless the text already begins with BOS."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        found: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for number, answer in self._answers([tokens for _, *tokens in requests]):
            found[number] = answer
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
            self._on_progress("answers", len(found), len(requests))
        return [found[number] for number in range(len(requests))]

    def _answers(self, requests: list[Any]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(number, `_score`) of each context and continuation, in any order."""
        asked: dict[Window, list[int]] = {}
        for number, (context, continuation) in enumerate(requests):
            asked.setdefault(self._window(context, continuation), []).append(number)
        for batch in self._batches(list(asked)):
            for window, logits in zip(batch, self._logits(batch), strict=True):
                yield from ((number, _score(logits, requests[number][1])) for number in asked[window])

    def _window(self, context: list[int], continuation: list[int]) -> Window:
        """The tokens, and the position, from which a continuation's logits are computed."""
        count = len(continuation)
        if not 1 <= count <= self.max_length:
            raise EvaluationError(
                f"expected an answer of 1 to {self.max_length} tokens, found {count} after "
                f"{self.tokenizer.decode(context)[-60:]!r}"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :][:-1]
        return tuple(tokens), len(tokens) - count

    def _batches(self, windows: list[Window]) -> Iterator[list[Window]]:
        """Windows in batches, the longest first, so that memory runs out early if it does at all.

        A scorer that takes one row gets them in their own order, in which neighbours often share a prefix.
        """
        if not self.scorer.batch_tokens:
            yield from ([window] for window in windows)
            return
        batch: list[Window] = []
        for window in sorted(windows, key=lambda window: len(window[0]), reverse=True):
            if batch and len(batch[0][0]) * (len(batch) + 1) > self.scorer.batch_tokens:
                yield batch
                batch = []
            batch.append(window)
        if batch:
            yield batch

    def _logits(self, batch: list[Window]) -> list[Tensor]:
        """Logits [len(tokens) - start, V] of each window; a causal model ignores padding on the right."""
        first, width = min(start for _, start in batch), max(len(tokens) for tokens, _ in batch)
        rows = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens, _ in batch])
        require_known(self.scorer, rows)
        found = self.scorer.logits(rows, first)
        return [
            logits[start - first : len(tokens) - first].float()
            for logits, (tokens, start) in zip(found, batch, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        found = []
        for (text,) in self._counted("texts", [request.args for request in requests]):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            answers = self._answers([make_disjoint_window(window) for window in windows])
            found.append(sum(likelihood for _, (likelihood, _) in answers))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        found = []
        for context, settings in self._counted("generations", [request.args for request in requests]):
            found.append(self._generate(context, settings))
            self.cache_hook.add_partial("generate_until", (context, settings), found[-1])
        return found

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        """Greedily generated text, up to but without the stop."""
        if settings.get("do_sample"):
            raise EvaluationError(f"expected a task with greedy generation, found {settings}")
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        room = int(settings.get("max_gen_toks", settings.get("max_new_tokens", _MAX_NEW_TOKENS)))
        if not 0 < room < self.max_length:
            raise EvaluationError(
                f"the task generates up to {room} tokens; the model holds {self.max_length} with the prompt"
            )
        tokens = self.tok_encode(context)[-(self.max_length - room) :]
        new: list[int] = []
        text = ""
        while len(new) < room and not any(stop in text for stop in stops):
            (logits,) = self._logits([((*tokens, *new), len(tokens) + len(new) - 1)])
            token = int(logits.argmax())
            if token == self.eot_token_id:
                break
            new.append(token)
            text = self.tokenizer.decode(new)
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def _counted(self, name: str, items: list[Any]) -> Iterator[Any]:
        for number, item in enumerate(items):
            yield item
            self._on_progress(name, number + 1, len(items))


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """(log-probability of a continuation in nats, whether greedy decoding would produce it)."""
    targets = torch.tensor(continuation, device=logits.device)
    picked = logits.log_softmax(-1).gather(-1, targets[:, None])
    return float(picked.sum()), bool((logits.argmax(-1) == targets).all())
