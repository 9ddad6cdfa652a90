"""QuantizeWeights: the integers, scales and errors that its docstring promises."""

from __future__ import annotations

import functools

import pytest
import torch
from architectures import tiny_wide
from helpers import captured, check, count, difference
from torch import Tensor, fx

import rolora_passes.graphs.quantizers  # noqa: F401  (registers quantized_decomposed)
from rolora_passes import FoldConstants, FuseNorm, QuantizeWeights, Rotate, apply_passes, history
from rolora_passes.errors import PassError, PassOrderError
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import is_op, parameters, values

decomposed = torch.ops.quantized_decomposed


@functools.cache
def wide() -> fx.GraphModule:
    """A llama whose widths are multiples of 64."""
    return capture(tiny_wide(torch.float32))


def weights(graph: fx.GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """(integers, scales) by parameter of a folded graph."""
    found = parameters(graph)
    return {
        n.removesuffix("_q"): (found[n], found[n.removesuffix("_q") + "_scale"])
        for n in found
        if n.endswith("_q")
    }


@pytest.mark.parametrize("group", [32, 64])
def test_groups_of_four_bits(group: int) -> None:
    graph = check(wide(), [QuantizeWeights(group_size=group), FoldConstants()])
    originals = parameters(wide())
    assert len(weights(graph)) == 15
    for name, (q, scale) in weights(graph).items():
        w = originals[name].double()
        assert q.dtype == torch.int8 and q.min() >= -8 and q.max() <= 7
        assert scale.dtype == torch.float32 and scale.shape == (w.shape[0], w.shape[1] // group)
        assert torch.equal(scale, scale.bfloat16().float())
        steps = scale.double().repeat_interleave(group, 1)
        # Half a step, and what bfloat16's rounding of the scale cuts off the largest.
        assert ((q * steps - w).abs() <= steps * (0.5 + 7 * 2**-8)).all()
        largest = w.unflatten(-1, (-1, group)).abs().amax(-1)
        assert ((scale * 7 / largest - 1).abs() < 2**-8).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_per_channel(bits: int) -> None:
    graph = check(wide(), [QuantizeWeights(bits=bits, group_size=None, head=bits), FoldConstants()])  # type: ignore
    originals, most = parameters(wide()), 2 ** (bits - 1) - 1
    for name, (q, scale) in weights(graph).items():
        w = originals[name].double()
        assert q.min() >= (-8 if bits == 4 else -127) and q.max() <= most
        assert scale.shape in ((w.shape[0],), (w.shape[0], 1))
        torch.testing.assert_close(scale.flatten(), (w.abs().amax(-1) / most).float())
        steps = scale.double().reshape(-1, 1)
        assert ((q * steps - w).abs() <= steps * 0.5 * (1 + 1e-6)).all()


def test_integers_are_those_of_torchs_own_quantizer() -> None:
    graph = apply_passes(wide(), [QuantizeWeights(group_size=32, head=8), FoldConstants()])
    originals = parameters(wide())
    for name, (q, scale) in weights(graph).items():
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        if name == "lm_head.weight":
            expected = decomposed.quantize_per_channel(
                originals[name], scale.flatten(), zeros.flatten(), 0, -127, 127, torch.int8
            )
        else:
            expected = decomposed.quantize_per_channel_group(
                originals[name], scale, zeros, -8, 7, torch.int8, 32
            )
        off = (q.int() - expected.int()).abs()
        assert off.max() <= 1 and (off > 0).double().mean() < 1e-3, name  # ties: torch multiplies by 1/s


def test_the_graph_dequantizes_by_torchs_own_operator() -> None:
    graph = apply_passes(wide(), [QuantizeWeights(), FoldConstants()])
    known = {n.name: v for n, v in values(graph, torch.tensor([[1, 2]]))}
    for node in graph.graph.nodes:
        if is_op(node, "dequantize_per_channel_group"):
            name = str(node.args[0].target).removesuffix("_q")
            q, scale = weights(graph)[name]
            torch.testing.assert_close(known[node.name], q * scale.repeat_interleave(32, 1), rtol=0, atol=0)


def test_folding_keeps_the_quantized_function() -> None:
    graph = apply_passes(wide(), [FuseNorm(), Rotate(), FoldConstants(), QuantizeWeights()])
    folded = check(graph, [FoldConstants()])
    assert difference(folded, graph) < 1e-6


def test_eight_bits_are_closer_than_four() -> None:
    errors = [
        difference(apply_passes(wide(), [QuantizeWeights(bits=b, head=b)]), wide())  # type: ignore[arg-type]
        for b in (4, 8)
    ]
    assert 0 < errors[1] < errors[0] / 4


def test_a_weight_of_zeros_stays_zero() -> None:
    from rolora_passes.graphs.ops import choose_scale, quantize

    weight = torch.zeros(2, 64)
    scale = choose_scale(weight, 32, 7)
    assert (scale > 0).all() and not quantize(weight, scale, -8, 7).any()


def test_head_and_targets() -> None:
    graph = apply_passes(wide(), [QuantizeWeights(head=None, targets=("up_proj", "lm_head"))])
    report = history(graph)[-1].report
    assert count(graph, "dequantize_per_channel_group") == len(report.changed) == 2
    assert len(report.left) == 13 and dict(report.left)["lm_head"] == "left in floating point by the options"
    graph = apply_passes(wide(), [QuantizeWeights(head=8)])
    assert count(graph, "dequantize_per_channel") == 1 and count(graph, "dequantize_per_channel_group") == 14


def test_errors() -> None:
    with pytest.raises(PassError, match=r"groups of 256 do not divide .*, whose input is 64"):
        apply_passes(wide(), [QuantizeWeights(group_size=256)])
    with pytest.raises(PassError, match="bits must be 4 or 8, found 3"):
        QuantizeWeights(bits=3)
    with pytest.raises(PassError, match=r"groups of \(32, 64, 128, 256\), found 48"):
        QuantizeWeights(group_size=48)
    with pytest.raises(PassOrderError, match=r"quantize-weights cannot run .* already 'weights quantized'"):
        apply_passes(wide(), [QuantizeWeights(), QuantizeWeights()])


def test_a_graph_in_another_type_is_refused() -> None:
    with pytest.raises(
        PassError, match=r"expected a graph in torch.float32, found torch.float64; convert it"
    ):
        apply_passes(captured("llama"), [QuantizeWeights(group_size=None)])
