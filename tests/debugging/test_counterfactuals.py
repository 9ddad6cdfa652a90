"""What one site in floating point, or one Hadamard less, changes."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from helpers import tokens_for
from subjects import GROUPS, ROTATED, recipe, rotated, twins, wide, with_noise, with_tensor
from torch import fx

from rolora_passes import apply_passes
from rolora_passes.debugging.counterfactuals import bare_recipe, sites_in_float, without_hadamards
from rolora_passes.errors import PassError
from rolora_passes.graphs.running import run

SITE = "model.layers.1.self_attn.v_proj"
CACHE = [*GROUPS, {"quantize-kv-cache": {"keys": 3, "values": 4}}]


def kl(graph: fx.GraphModule, reference: fx.GraphModule, tokens: torch.Tensor) -> float:
    p, q = (torch.log_softmax(run(g, tokens).double(), -1) for g in (reference, graph))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_worst_site_gains_the_most_in_floating_point() -> None:
    tokens = tokens_for(wide(), 2, 12)
    bad = with_tensor(with_noise(rotated()), SITE + ".weight", lambda w: w.mul_(-2))
    done: list[tuple[int, int]] = []
    found = sites_in_float(rotated(), bad, tokens, lambda number, of: done.append((number, of)))
    assert len(found.changes) == 16 and done[-1] == (16, 16)
    assert found.changes[0].site == SITE and found.kl == pytest.approx(kl(bad, rotated(), tokens), rel=1e-3)
    assert found.changes[0].kl == pytest.approx(-found.kl, rel=1e-3)
    assert all(abs(change.kl) < 0.01 * found.kl for change in found.changes[1:])
    assert json.loads(json.dumps(found.row()))["changes"][0]["site"] == SITE


def test_a_site_in_float_is_the_recipe_without_that_site() -> None:
    twin, quantized = twins(groups=True)
    tokens = tokens_for(wide(), 2, 12)
    found = sites_in_float(twin, quantized, tokens)
    change = next(c for c in found.changes if c.site == SITE)
    without = [*ROTATED, {"quantize-weights": {"exclude": ["v_proj"]}}, "fold-constants"]
    first = {"quantize-weights": {"targets": ["re:model.layers.0.self_attn.v_proj"]}}
    expected = apply_passes(wide(), [*without[:-1], first, without[-1]], verify=False)  # type: ignore[list-item]
    assert found.kl + change.kl == pytest.approx(kl(expected, twin, tokens), rel=1e-2)


@functools.cache
def cached(factors: bool) -> tuple[fx.GraphModule, fx.GraphModule, fx.GraphModule]:
    online = [*ROTATED[:2], {"insert-hadamard": {"factors": factors}}]
    steps = recipe(*online, *CACHE)
    twin = apply_passes(wide(), [*online, "fold-constants"], verify=False)
    return twin, *(apply_passes(wide(), passes, verify=False) for passes in (steps, bare_recipe(steps)))


@pytest.mark.parametrize("factors", [False, True])
def test_hadamards_with_their_inverses(factors: bool) -> None:
    tokens = tokens_for(wide(), 2, 12)
    twin, quantized, bare = cached(factors)
    found = without_hadamards(twin, quantized, bare, tokens)
    downs = {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)}
    assert {change.site for change in found.changes} == {
        *downs,
        "attention of layer 0",
        "attention_1 of layer 1",
    }
    assert found.kl == pytest.approx(kl(quantized, twin, tokens), rel=1e-2)


def test_leaving_a_pair_out_keeps_an_unquantized_function() -> None:
    """The inverse goes with the Hadamard: without quantizers nothing changes."""
    tokens = tokens_for(wide(), 2, 12)
    with_pairs, without = (
        apply_passes(wide(), [*steps, "fold-constants"], verify=False)
        for steps in ([*ROTATED[:2], "insert-hadamard"], ROTATED[:2])
    )
    found = without_hadamards(with_pairs, with_pairs, without, tokens)
    assert len(found.changes) == 4 and all(abs(change.kl) < 1e-6 for change in found.changes)


def test_a_graph_without_hadamards_is_refused() -> None:
    twin, quantized = twins(groups=True)
    with pytest.raises(PassError, match="found a graph without online Hadamards"):
        without_hadamards(twin, twin, quantized, tokens_for(wide()))
