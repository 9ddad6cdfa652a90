"""Every recipe that comes as a file lowers, and its program computes what its graph does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tokens_for
from test_quantize_weights import wide

from rolora_passes import apply_passes
from rolora_passes.errors import LoweringError
from rolora_passes.export.executorch.lower import to_executorch
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error
from rolora_passes.recipes import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_program_equals_graph(name: str, tmp_path: Path) -> None:
    data = tokens_for(wide(), 4, 40, seed=8)
    graph = apply_passes(wide(), load_recipe(name), calibration=data)
    to_executorch(graph, tmp_path / "model.pte", max_length=32, last_token=False)
    tokens = tokens_for(graph, 1, 12)
    found = load_pte(tmp_path / "model.pte")(tokens, torch.tensor([0]))
    # int8 activations that fall on a tie go one way here and another there
    assert relative_error(found, run(graph, tokens)) < (1e-5 if name == "float" else 0.05)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("rtn:W3A16", None),  # plain linears hold any weight
        ("rtn:W4A4", "XNNPACK quantizes activations to 8 bits, asymmetric, .* found .*'bits': 4"),
        ("rtn:W16A16KV4", "ExecuTorch's cache holds float32, or int8 .*; found keys of 4 bits"),
    ],
)
def test_settings_without_a_kernel_say_so(recipe: str, message: str | None, tmp_path: Path) -> None:
    graph = apply_passes(wide(), ["fuse-norm", *load_recipe(recipe), "fold-constants"])
    if message is None:
        assert to_executorch(graph, tmp_path / "model.pte", max_length=32).bytes > 0
        return
    with pytest.raises(LoweringError, match=message):
        to_executorch(graph, tmp_path / "model.pte", max_length=32)
    assert not list(tmp_path.iterdir())
