"""QuantizeActivations: one quantizer a value, in torch's own operators."""

from __future__ import annotations

import pytest
import torch
from helpers import check, count, difference
from test_quantize_weights import wide

from rolora_passes import QuantizeActivations, QuantizeWeights, apply_passes, history
from rolora_passes.errors import PassOrderError
from rolora_passes.graphs.graph import is_op, values


def test_linears_that_read_one_value_share_its_quantizer() -> None:
    graph = check(wide(), [QuantizeWeights(), QuantizeActivations()])
    inputs = {n.args[0] for n in wide().graph.nodes if is_op(n, "linear")}
    assert count(graph, "quantize_per_token") == len(inputs) == 2 * 4 + 1
    assert all(is_op(n.args[0], "dequantize_per_token") for n in graph.graph.nodes if is_op(n, "linear"))


def test_tokens_are_rounded_to_half_a_step() -> None:
    graph = apply_passes(wide(), [QuantizeWeights(), QuantizeActivations()])
    known = dict(values(graph, torch.arange(12).reshape(2, 6)))
    for node in graph.graph.nodes:
        if is_op(node, "dequantize_per_token"):
            q, scale, zero = (known[a] for a in node.args[:3])
            value = known[node.args[0].args[0]]
            assert q.dtype == torch.int8 and scale.shape == (*value.shape[:-1], 1)
            assert ((known[node] - value).abs() <= scale * 0.5 * (1 + 1e-5)).all()
            assert ((zero >= -128) & (zero <= 127)).all()


def test_costs_little() -> None:
    weights = apply_passes(wide(), [QuantizeWeights(bits=8, head=8)])
    assert 0 < difference(apply_passes(weights, [QuantizeActivations()]), weights) < 0.1


def test_targets_and_floating_weights_are_left() -> None:
    graph = apply_passes(
        wide(), [QuantizeWeights(head=None), QuantizeActivations(targets=("q_proj", "lm_head"))]
    )
    left = dict(history(graph)[-1].report.left)
    assert left["lm_head"] == "its weight is in floating point"
    assert left["model.layers.0.mlp.up_proj"] == "left in floating point by the options"
    assert count(graph, "quantize_per_token") == 2


def test_needs_quantized_weights() -> None:
    with pytest.raises(
        PassOrderError, match=r"requires a graph with 'weights quantized'.*run quantize-weights first"
    ):
        apply_passes(wide(), [QuantizeActivations()])
