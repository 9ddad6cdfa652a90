"""How many greedy tokens of a program are its graph's: one call tells what generating them would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rolora_passes.evaluation.parity import _agreeing, _greedy
from rolora_passes.evaluation.scorers import Scorer


class Chain(Scorer):
    """The likeliest token hangs on all before it; at one position it is another one."""

    def __init__(self, other_at: int | None = None) -> None:
        self.other_at = other_at

    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        following = (tokens.cumsum(-1) * 7 + 3) % 31
        if self.other_at is not None and self.other_at < tokens.shape[1]:
            following[:, self.other_at] = (following[:, self.other_at] + 1) % 31
        return torch.nn.functional.one_hot(following, 31)[:, start:].float()


@pytest.mark.parametrize("other_at", [None, 4, 5, 11, 12, 13, 20])
def test_tokens_that_agree_are_counted_as_if_both_had_generated(other_at: int | None) -> None:
    start, new = 5, 8
    tokens = torch.arange(start)[None]
    written, own = (_greedy(scorer, tokens, new) for scorer in (Chain(other_at), Chain()))
    assert written.shape == (1, start + new)
    same = (written == own)[0, start:].tolist()
    expected = same.index(False) if False in same else new
    assert _agreeing(Chain(), written, start) == expected
    assert expected == (new if other_at is None or other_at >= start + new - 1 else other_at - start + 1)
