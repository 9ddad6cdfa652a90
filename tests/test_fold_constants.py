"""FoldConstants evaluates every expression once, in float64, and leaves plain parameters."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS, chosen
from helpers import captured, check_exact, check_idempotent, difference

from rolora_passes import (
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    QuantizeEmbedding,
    QuantizeWeights,
    Rotate,
    apply_passes,
)
from rolora_passes.errors import PassError
from rolora_passes.graphs import evaluate
from rolora_passes.graphs.dtypes import convert
from rolora_passes.graphs.graph import constants, parameters, set_tensor
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_leaves_parameters_alone_and_nothing_to_do(name: str) -> None:
    graph = check_exact(captured(name), [FoldConstants()])
    assert {n.op for n in constants(graph)} == {"get_attr"}
    check_idempotent(graph, FoldConstants())


def test_parameters_get_their_names_back() -> None:
    before = captured("llama")
    after = apply_passes(before, [FuseNorm(), Rotate(), InsertHadamard(), FoldConstants()])
    gone = set(parameters(before)) - set(parameters(after))
    assert set(parameters(after)) <= set(parameters(before))
    assert all(name.endswith("norm.weight") for name in gone)


def test_precision_does_not_decay_pass_by_pass() -> None:
    """Folded float32 weights are float64's, rounded once: as close as rounding the final weights."""
    passes = [FuseNorm(), Rotate(), InsertHadamard(), FoldConstants()]
    single = captured("llama", torch.float32)
    exact = parameters(apply_passes(convert(single, torch.float64), passes))
    found = parameters(apply_passes(single, passes))
    table = "model.layers.0.mlp.down_proj.weight"  # rotated, transformed
    assert found[table].dtype == torch.float32
    assert torch.equal(found[table], exact[table].float())


def test_in_blocks_of_rows_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = [FuseNorm(), Rotate(), QuantizeWeights(group_size=None), QuantizeEmbedding(), FoldConstants()]
    whole = parameters(apply_passes(captured("llama", torch.float32), passes))
    monkeypatch.setattr(evaluate, "_BLOCK", 24 * 10)
    blocks = parameters(apply_passes(captured("llama", torch.float32), passes))
    assert list(blocks) == list(whole)
    assert all(torch.equal(blocks[name], whole[name]) for name in whole)


def test_quantizers_fold_to_integers_and_scales() -> None:
    graph = apply_passes(
        captured("llama", torch.float32), [QuantizeWeights(group_size=None), QuantizeEmbedding()]
    )
    folded = apply_passes(graph, [FoldConstants()])
    assert relative_error(run(folded, torch.arange(9)[None]), run(graph, torch.arange(9)[None])) < 1e-6
    kinds = {
        name.rsplit("_", 1)[-1]: value.dtype for name, value in parameters(folded).items() if "proj" in name
    }
    assert kinds == {"q": torch.int8, "scale": torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    graph = apply_passes(captured("llama"), [FuseNorm()])
    name = "model.layers.1.mlp.up_proj.weight"
    damaged = parameters(graph)[name].clone()
    damaged[2, 3] = value
    set_tensor(graph, name, damaged)
    with pytest.raises(PassError, match=rf"{name} came out NaN or infinite"):
        apply_passes(graph, [FoldConstants()], verify=False)


def test_the_input_graph_keeps_its_tensors() -> None:
    graph = apply_passes(captured("llama"), [FuseNorm()])
    apply_passes(graph, [FoldConstants()])
    assert difference(graph, captured("llama")) < 1e-10
