"""QuantizeActivations: one quantizer a value, chosen by structure, dynamic or from what was observed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check, count, difference, tokens_for
from test_quantize_weights import wide
from torch import fx

from rolora_passes import QuantizeActivations, QuantizeWeights, apply_passes, history
from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import (
    add_parameter,
    copy_graph,
    get_tensor,
    insert_after,
    is_op,
    linears,
)
from rolora_passes.graphs.running import run, values
from rolora_passes.numerics import affine


def quantizers(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if is_op(n, "fake_quantize", "fake_quantize_static")]


def test_linears_that_read_one_value_share_its_quantizer() -> None:
    graph = check(wide(), [QuantizeWeights(), QuantizeActivations()])
    inputs = {n.args[0] for n in wide().graph.nodes if is_op(n, "linear")}
    assert len(quantizers(graph)) == len(inputs) == 2 * 4 + 1
    assert all(is_op(n.args[0], "fake_quantize") for n in linears(graph))


@pytest.mark.parametrize(
    "options",
    [{}, {"bits": 4, "symmetric": True, "clip": 0.9}, {"bits": 3, "group_size": 16}, {"bits": 6}],
    ids=str,
)
def test_values_are_those_of_the_arithmetic(options: dict[str, Any]) -> None:
    step = QuantizeActivations(float_weights=True, head=None, **options)
    graph = check(wide(), [step])
    known = dict(values_kept(graph))
    assert len(quantizers(graph)) == 8
    for node in quantizers(graph):
        assert torch.equal(
            known[node],
            affine.fake_quantize(known[node.args[0]], step.bits, step.group_size, step.symmetric, step.clip),
        )


def values_kept(graph: fx.GraphModule) -> list[tuple[fx.Node, Any]]:
    return list(values(graph, tokens_for(graph)))


def test_costs_little_at_eight_bits_and_more_at_four() -> None:
    weights = apply_passes(wide(), [QuantizeWeights(bits=8, head=8)])
    costs = [
        difference(apply_passes(weights, [QuantizeActivations(bits=b, head=b)]), weights) for b in (8, 6, 4)
    ]
    assert 0 < costs[0] < costs[1] / 2 < costs[2] / 4 and costs[0] < 0.1


def test_targets_and_floating_weights_are_left() -> None:
    graph = apply_passes(
        wide(), [QuantizeWeights(head=None), QuantizeActivations(targets=("q_proj", "lm_head"))]
    )
    left = dict(history(graph)[-1].report.left)
    assert left["lm_head"] == "its weight is in floating point"
    assert left["model.layers.0.mlp.up_proj"] == "left in floating point by the options"
    assert len(quantizers(graph)) == 2
    with pytest.raises(PassError, match="quantize-activations: no linear matches 'qproj'"):
        apply_passes(wide(), [QuantizeActivations(targets="qproj")])


def test_down_projections_at_eight_bits_and_the_rest_at_four() -> None:
    options = {"float_weights": True, "head": None}
    graph = apply_passes(
        wide(),
        [
            QuantizeActivations(bits=8, targets="down_proj", **options),  # type: ignore[arg-type]
            QuantizeActivations(bits=4, exclude=("o_proj",), **options),  # type: ignore[arg-type]
        ],
    )
    assert sorted(n.args[1] for n in quantizers(graph)) == [4] * 4 + [8] * 2
    left = dict(history(graph)[-1].report.left)
    assert left["model.layers.1.mlp.down_proj"] == "its input is quantized already"
    assert left["model.layers.1.self_attn.o_proj"] == "left in floating point by the options"


def observed(low: float, high: float) -> fx.GraphModule:
    """The graph with an observer of one range on every value that linears read."""
    graph = copy_graph(wide())
    seen = [add_parameter(graph, f"seen.{n}", torch.tensor([v])) for n, v in (("low", low), ("high", high))]
    for value in {n.args[0]: None for n in linears(graph)}:
        node = insert_after(graph, value, torch.ops.rolora.observed.default, value, *seen)
        value.replace_all_uses_with(node, delete_user_cb=lambda user, own=node: user is not own)
    graph.recompile()
    return graph


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_grids_come_from_observers(symmetric: bool) -> None:
    step = QuantizeActivations(static=True, float_weights=True, symmetric=symmetric, bits=6, head=6)
    graph = check(observed(-1.5, 2.0), [step])
    assert count(graph, "observed") == 0 and len(quantizers(graph)) == 9
    scale, zero = affine.qparams(torch.tensor(-1.5), torch.tensor(2.0), 6, symmetric)
    known = dict(values_kept(graph))
    for node in quantizers(graph):
        expected = affine.round_trip(known[node.args[0]], scale, zero, 6, symmetric)
        assert torch.equal(known[node], expected) and known[node].abs().max() <= 2.1


def test_dynamic_grids_need_no_observers_and_remove_them() -> None:
    graph = apply_passes(observed(-1, 1), [QuantizeActivations(float_weights=True)])
    assert count(graph, "observed") == 0
    expected = apply_passes(wide(), [QuantizeActivations(float_weights=True)])
    assert torch.equal(run(graph, tokens_for(graph)), run(expected, tokens_for(graph)))


def test_clips_are_those_that_change_the_linears_least() -> None:
    """The search is by Gram matrices; here by what the linears that read a value give, one clip at a time."""
    graph, tokens = wide(), torch.randint(0, 64, (4, 16))
    options: dict[str, Any] = {"bits": 4, "symmetric": True, "head": None, "float_weights": True}
    step = QuantizeActivations(clip_search=True, **options)
    with pytest.raises(PassError, match="quantize-activations looks at data and was given none"):
        apply_passes(graph, [step])
    found = apply_passes(graph, [step], calibration=tokens)
    known = dict(values(graph, tokens)) | {
        n: get_tensor(graph, str(n.target)) for n in graph.graph.find_nodes(op="get_attr")
    }
    clips = set()
    for value in {n.args[0]: None for n in linears(graph)[:-1]}:
        readers = [n for n in linears(graph) if n.args[0] is value]
        losses = {}
        for clip in [i / 20 for i in range(20, 9, -1)]:
            rounded = affine.fake_quantize(known[value], 4, None, True, clip)
            changes = [
                F.linear(rounded, known[n.args[1]]) - F.linear(known[value], known[n.args[1]])
                for n in readers
            ]
            losses[clip] = sum(change.detach().double().square().sum().item() for change in changes)
        (node,) = {n.args[0] for n in linears(found) if n.name in {r.name for r in readers}}
        assert losses[node.args[4]] == pytest.approx(min(losses.values()), rel=1e-4)
        clips.add(node.args[4])
    assert len(clips) > 1 and set(history(found)[-1].report.notes["clips"].values()) == clips


def test_errors() -> None:
    with pytest.raises(
        PassError, match=r"static needs to know the range of what .*q_proj reads: run observe"
    ):
        apply_passes(wide(), [QuantizeActivations(static=True, float_weights=True)])
    with pytest.raises(PassError, match=r"groups of 48 do not divide .*, whose width is 64"):
        apply_passes(wide(), [QuantizeActivations(group_size=48, float_weights=True)])
    with pytest.raises(PassError, match="group_size must be 2 or more or None, found 32 with static"):
        QuantizeActivations(group_size=32, static=True)
    for wrong in ({"static": True}, {"clip": 0.9}):
        with pytest.raises(
            PassError, match="clip_search chooses the clip of dynamic grids: leave clip and static"
        ):
            QuantizeActivations(clip_search=True, **wrong)
