"""InsertScaling: scales that cancel, wherever basis inference finds that they do."""

from __future__ import annotations

import pytest
import torch
from architectures import SOME
from helpers import captured, check_exact, difference, matrices, tokens_for
from torch import Tensor, fx

from rolora_passes import (
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    InsertScaling,
    Rotate,
    apply_passes,
    history,
)
from rolora_passes.errors import PassError, PassOrderError
from rolora_passes.graphs.bases.rotations import load_rotations, save_rotations
from rolora_passes.graphs.graph import copy_graph, parameters, set_tensor, site_names
from rolora_passes.graphs.info import info
from rolora_passes.graphs.running import values

DOWN = "model.layers.0.mlp.down_proj.scale"


def scales_for(name: str) -> dict[str, Tensor]:
    """Random scales for every site of a model."""
    manifest = info(apply_passes(captured(name), [FuseNorm(), InsertScaling()])).rotations
    generator = torch.Generator().manual_seed(4)
    return {k: torch.rand(e.size, generator=generator).double() * 3 + 0.2 for k, e in manifest.items()}


@pytest.mark.parametrize("name", SOME)
def test_keeps_the_function(name: str) -> None:
    steps = [InsertScaling(given=scales_for(name)), Rotate(), InsertHadamard(factors=True), FoldConstants()]
    check_exact(captured(name), [FuseNorm(), *steps])


def test_finds_values_and_gated_products() -> None:
    graph = apply_passes(captured("llama"), [FuseNorm(), InsertScaling()])
    assert set(info(graph).rotations) == {
        f"model.layers.{i}.{site}.scale" for i in (0, 1) for site in ("self_attn.o_proj", "mlp.down_proj")
    }
    ((site, reason),) = history(graph)[-1].report.left
    assert "q_proj" in site and "keeps lengths only" in reason


def test_scales_travel_with_rotations(tmp_path: object) -> None:
    given = scales_for("llama")
    graph = apply_passes(captured("llama"), [FuseNorm(), InsertScaling(given=given), Rotate()])
    save_rotations(graph, str(tmp_path))
    for file in ("R.bin", "rotations.json"):
        loaded = load_rotations(f"{tmp_path}/{file}")
        assert set(loaded) == set(info(graph).rotations)
        torch.testing.assert_close(loaded[DOWN].double(), given[DOWN], rtol=1e-6, atol=0)
        again = [FuseNorm(), InsertScaling(given=loaded), Rotate(given=loaded), FoldConstants()]
        check_exact(captured("llama"), again)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model.layers.7.mlp.down_proj.scale": torch.ones(40)}, "fit no scaling"),
        ({DOWN: torch.ones(39)}, "40 positive numbers"),
        ({DOWN: -torch.ones(40)}, "40 positive numbers"),
        ({DOWN: torch.full((40,), float("inf"))}, "40 positive numbers"),
    ],
)
def test_bad_scales(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(PassError, match=message):
        apply_passes(captured("llama"), [FuseNorm(), InsertScaling(given=given)])


def test_order() -> None:
    with pytest.raises(PassOrderError, match="already 'scalings inserted'"):
        apply_passes(captured("llama"), [FuseNorm(), InsertScaling(), InsertScaling()])
    with pytest.raises(PassOrderError, match="fuse-norm first"):
        apply_passes(captured("llama"), [InsertScaling()])


def with_row(value: float) -> fx.GraphModule:
    """A llama with one row of its first up projection set; copies share tensors, so that is a new one."""
    graph, name = copy_graph(captured("llama")), "model.layers.0.mlp.up_proj.weight"
    weight = parameters(graph)[name].detach().clone()
    weight[3] = value
    set_tensor(graph, name, weight)
    return graph


def balanced(graph: fx.GraphModule, tokens: Tensor) -> fx.GraphModule:
    return apply_passes(graph, [FuseNorm(), InsertScaling(balance=True)], verify=False, calibration=tokens)


@pytest.mark.parametrize("name", SOME)
def test_balance_keeps_the_function(name: str) -> None:
    graph = captured(name)
    steps = [FuseNorm(), InsertScaling(balance=True), Rotate(), InsertHadamard(factors=True), FoldConstants()]
    found = apply_passes(graph, steps, calibration=tokens_for(graph))
    assert difference(found, graph) < 1e-10


@pytest.mark.parametrize("site", ["self_attn.o_proj", "mlp.down_proj"])
def test_balance_makes_the_error_least(site: str) -> None:
    """No other s makes ‖x/s‖² ‖D·s‖² less, every token counting alike."""
    tokens = tokens_for(captured("llama"), 4, 8)
    graph = balanced(captured("llama"), tokens)
    start = matrices(graph)[f"model.layers.0.{site}.scale"]
    assert abs(float(start.log().mean())) < 1e-9
    before = apply_passes(captured("llama"), [FuseNorm()])
    (read,) = (n for n, name in site_names(before).items() if name == f"model.layers.0.{site}")
    x = next(v for n, v in values(before, tokens) if n is read.args[0]).flatten(0, -2)
    x = (x / x.norm(dim=-1, keepdim=True)).unflatten(-1, (-1, len(start)))
    weight = parameters(before)[f"model.layers.0.{site}.weight"].unflatten(-1, (-1, len(start)))
    log = start.log().requires_grad_()
    error = (x / log.exp()).square().sum().log() + (weight.detach() * log.exp()).square().sum().log()
    (slope,) = torch.autograd.grad(error, log)
    assert slope.abs().max() < 1e-9  # it is convex in log s: where it is level it is least


def test_balance_leaves_channels_that_are_zero() -> None:
    graph = with_row(0)
    scale = matrices(balanced(graph, tokens_for(graph)))[DOWN]
    assert scale[3] == 1
    assert (scale != 1).sum() == len(scale) - 1


def test_given_scales_need_no_calibration() -> None:
    given = scales_for("llama")
    graph = apply_passes(captured("llama"), [FuseNorm(), InsertScaling(balance=True, given=given)])
    torch.testing.assert_close(matrices(graph)[DOWN], given[DOWN])
    with pytest.raises(PassError, match="calibration"):
        apply_passes(captured("llama"), [FuseNorm(), InsertScaling(balance=True)])


def test_balance_refuses_what_is_not_finite() -> None:
    graph = with_row(float("inf"))
    with pytest.raises(PassError, match=r"the input of model\.layers\.0\.mlp\.down_proj is NaN or infinite"):
        balanced(graph, tokens_for(graph))
