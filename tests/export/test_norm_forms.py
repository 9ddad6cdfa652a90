"""Norms as PyTorch writes them: any epsilon, one axis or two, with gain and bias or without, in every
runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rolora_passes import apply_passes
from rolora_passes.export import to_executorch, to_onnx
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.export.onnx.runner import OnnxProgram
from rolora_passes.graphs import operators as _operators  # noqa: F401  (registers the operators)
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error

FORMS: dict[str, Any] = {
    "rms, the type's own epsilon": lambda: nn.RMSNorm(32),
    "rms, no gain": lambda: nn.RMSNorm(32, eps=1e-6, elementwise_affine=False),
    "rms, two axes": lambda: nn.RMSNorm((4, 8), eps=1e-6),
    "rms, two axes, no gain": lambda: nn.RMSNorm((4, 8), 1e-6, elementwise_affine=False),
    "layer, two axes": lambda: nn.LayerNorm((4, 8)),
    "layer, two axes, nothing else": lambda: nn.LayerNorm((4, 8), elementwise_affine=False),
    "layer, no bias": lambda: nn.LayerNorm(32, bias=False),
    "layer, no gain and bias": lambda: nn.LayerNorm(32, elementwise_affine=False),
}


class Decoder(nn.Module):
    """Small values, so that epsilon matters; a residual sum before each norm, which kernels take with it."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(97, 32), nn.Linear(32, 97)
        self.places, self.mixed = nn.Embedding(32, 32), nn.Linear(32, 32)
        self.norm = norm
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.3)

    def normed(self, x: Tensor) -> Tensor:
        sizes = self.norm.normalized_shape
        if len(sizes) == 1:
            return self.norm(x)  # type: ignore[no-any-return]
        return self.norm(x.unflatten(-1, sizes)).flatten(-2)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = (self.embed(tokens) + self.places(positions)) * 1e-3
        heads = self.normed(x).unflatten(-1, (4, 8))
        x = x + 1e-3 * self.mixed(torch.ops.rolora.attention(heads, heads, heads, 0.3).flatten(-2))
        return self.out(self.normed(x))  # type: ignore[no-any-return]


def decoder(form: str) -> fx.GraphModule:
    torch.manual_seed(0)
    given = {"tokens": torch.zeros(2, 6, dtype=torch.int64), "positions": torch.arange(6).expand(2, 6)}
    auto = torch.export.Dim.AUTO
    shapes = {name: {0: auto, 1: auto} for name in given}
    model = Decoder(FORMS[form]()).eval()
    return apply_passes(torch.export.export(model, (), given, dynamic_shapes=shapes), ["fold-constants"])


@pytest.mark.parametrize("form", FORMS)
def test_a_norm_of_any_form(form: str, tmp_path: Path) -> None:
    graph, tokens = decoder(form), torch.arange(9)[None]
    expected = run(graph, tokens)[:, -1]
    for flavor in ("ort", "portable"):
        to_onnx(graph, tmp_path / flavor, flavor, max_length=32)  # type: ignore[arg-type]
        assert relative_error(OnnxProgram(tmp_path / flavor)(tokens, 0)[:, -1], expected) <= 1e-5
    to_executorch(graph, tmp_path / "model.pte", max_length=32)
    assert (
        relative_error(load_pte(tmp_path / "model.pte")(tokens, torch.tensor([0]))[:, -1], expected) <= 1e-5
    )
