"""Text from ExecuTorch's runner, where tokens are not whole characters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoint import save_byte_checkpoint

from rolora_passes.errors import RunError
from rolora_passes.export.executorch.lower import to_executorch
from rolora_passes.export.executorch.runner import _Text, generate
from rolora_passes.graphs import capture
from rolora_passes.loading.models import load_model


def test_tokens_that_are_half_a_character(tmp_path: Path) -> None:
    model, tokenizer = load_model(str(save_byte_checkpoint(tmp_path / "tiny", layers=1)))
    plain = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    with torch.no_grad():
        head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight.copy_(head)
        model.lm_head.weight[plain] = 0
    graph = capture(model)
    to_executorch(graph, tmp_path / "model.pte", max_length=32, check=False)
    tokens = tokenizer("It is", return_tensors="pt").input_ids
    for _ in range(12):
        logits = graph(tokens, torch.arange(tokens.shape[1])[None])
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    expected = tokenizer.decode(tokens[0])[len("It is") :]
    assert "\ufffd" in expected
    pieces: list[str] = []
    given = (tmp_path / "model.pte", tmp_path / "tiny/tokenizer.json", "It is", 12, 0.0)
    assert generate(*given, pieces.append) == expected == "".join(pieces)


def test_characters_are_told_whole(tmp_path: Path) -> None:
    save_byte_checkpoint(tmp_path)
    pieces: list[str] = []
    text = _Text(tmp_path / "tokenizer.json", "It is", pieces.append)
    for token in "aÃ©ðŁĺĢbð":  # a, é of two bytes, an emoji of four, b, and one that begins a character
        text.add(token)
    assert text.end() == "aé😀b\ufffd" and pieces == ["a", "é", "😀", "b", "\ufffd"]
    with pytest.raises(
        RunError, match=r"the runner gives the token 'ab', which tokenizer\.json does not have"
    ):
        text.add("ab")
