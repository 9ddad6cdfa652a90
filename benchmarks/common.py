"""What the benchmarks share: the model, a text, and comparisons of logits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from rolora_passes.graphs import capture
from rolora_passes.models import load_model


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model", help="model folder, hub name or .gguf (default: the packaged SmolLM2-135M)"
    )
    parser.add_argument(
        "--text", type=Path, default=Path(__file__).with_name("text.txt"), help="real text to read"
    )
    return parser


def captured(source: str | None) -> tuple[fx.GraphModule, Any]:
    """The model as a graph, and its tokenizer."""
    if source is None:
        from packaged_model import packaged_model

        source = str(packaged_model())
    model, tokenizer = load_model(source)
    return capture(model), tokenizer


def tokens_of(tokenizer: Any, text: Path, length: int) -> Tensor:
    """The first tokens of a text, int64 [1, length]."""
    found: Tensor = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :length]
    return found


def compare(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(KL divergence of found from expected in nats per token, top-1 agreement) of logits [..., V]."""
    p, q = (torch.log_softmax(x.float(), -1) for x in (expected, found))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return kl, float((found.argmax(-1) == expected.argmax(-1)).float().mean())
