"""Sensitivity: each site alone, the planted one first."""

from __future__ import annotations

import pytest
import torch
from helpers import tokens_for
from test_quantize_weights import wide

from rolora_passes import FuseNorm, QuantizeActivations, QuantizeWeights, apply_passes
from rolora_passes.errors import PassError
from rolora_passes.evaluation.sensitivity import sensitivity
from rolora_passes.graphs.graph import copy_graph, get_tensor, set_tensor
from rolora_passes.graphs.running import run

SITE = "model.layers.1.self_attn.o_proj"


def test_the_site_with_an_outlier_is_first() -> None:
    graph = copy_graph(wide())
    weight = get_tensor(graph, SITE + ".weight").clone()
    weight[:, 0] *= 60  # every other weight of a row falls between the steps of the grid
    set_tensor(graph, SITE + ".weight", weight)
    found = sensitivity(
        graph, [QuantizeWeights(bits=3, group_size=None, head=None)], tokens_for(graph, 2, 40)
    )
    assert len(found) == 14 and found[0].name == SITE
    assert [s.kl for s in found] == sorted((s.kl for s in found), reverse=True)


def test_losses_are_those_of_the_graph_with_one_site_quantized() -> None:
    tokens = tokens_for(wide(), 3, 150)
    found = sensitivity(wide(), [QuantizeWeights(bits=2, head=None)], tokens)
    assert len(found) == 14
    site = next(s for s in found if s.name == SITE)
    alone = apply_passes(wide(), [QuantizeWeights(bits=2, targets=SITE)])
    p, q = (torch.log_softmax(run(g, tokens).double(), -1) for g in (wide(), alone))
    assert site.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    following = tokens[:, 1:, None]
    growth = (p - q)[:, :-1].gather(-1, following).mean()
    assert site.nll == pytest.approx(float(growth), rel=1e-3, abs=1e-7)


def test_several_quantizers_and_progress() -> None:
    steps = [QuantizeWeights(bits=4, method="gptq", head=None), QuantizeActivations(bits=4)]
    seen: list[tuple[int, int]] = []
    found = sensitivity(wide(), steps, tokens_for(wide()), lambda done, of: seen.append((done, of)))
    assert len(found) == 14 and seen[-1] == (15, 15)


def test_errors() -> None:
    tokens = tokens_for(wide())
    with pytest.raises(PassError, match="expected at least one quantizer"):
        sensitivity(wide(), [], tokens)
    with pytest.raises(PassError, match="fuse-norm has no targets"):
        sensitivity(wide(), [FuseNorm()], tokens)
    with pytest.raises(PassError, match="found no site that quantizers change"):
        sensitivity(apply_passes(wide(), [QuantizeWeights()]), [QuantizeWeights()], tokens)
