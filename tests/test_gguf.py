"""A GGUF file gives the logits of the model that it was made of, or is refused by the entry's or tensor's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import MODELS, entries_of, tensors_of, tiny, write_gguf

from rolora_passes.models import load_model

BATCH = torch.randint(2, 250, (1, 40), generator=torch.Generator().manual_seed(1))


def error(found: torch.nn.Module, expected: torch.nn.Module) -> float:
    """The largest difference of logits, over the largest logit."""
    with torch.no_grad():
        right = expected(BATCH).logits
        return float((found(BATCH).logits - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_every_known_architecture(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    path = write_gguf(tmp_path / "a.gguf", name, entries_of(name, model), tensors_of(name, model))
    assert error(load_model(str(path))[0], model) < 1e-5
