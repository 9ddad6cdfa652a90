"""QuantizeWeights: the integers, scales and errors that its docstring promises."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from architectures import tiny_wide
from helpers import captured, check, count, difference, tokens_for
from torch import Tensor, fx

from rolora_passes import AddLoRA, FoldConstants, FuseNorm, QuantizeWeights, Rotate, apply_passes, history
from rolora_passes.errors import PassError
from rolora_passes.graphs.accounting import weigh
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import argument, is_op, parameters
from rolora_passes.graphs.running import run, values
from rolora_passes.numerics import affine
from rolora_passes.numerics.codebooks import absmax, encode
from rolora_passes.numerics.grids import codebook
from rolora_passes.passes.registry import make_pass


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
        assert scale.shape == (w.shape[0], 1)
        torch.testing.assert_close(scale.flatten(), (w.abs().amax(-1) / most).float())
        steps = scale.double().reshape(-1, 1)
        assert ((q * steps - w).abs() <= steps * 0.5 * (1 + 1e-6)).all()


OPTIONS = [
    {"bits": 2, "symmetric": False},
    {"bits": 3, "group_size": 16, "clip_search": True},
    {"bits": 6, "group_size": None},
    {"bits": 8, "head": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_integers_are_those_of_the_arithmetic(options: dict[str, Any]) -> None:
    step = QuantizeWeights(**options)
    graph = check(wide(), [step, FoldConstants()])
    originals = parameters(wide())
    for name, (q, scale) in weights(graph).items():
        bits = step.head if name == "lm_head.weight" else step.bits
        assert bits is not None
        group = 32 if step.group_size == "auto" else step.group_size
        grid = affine.Integers(bits, None if bits == 8 else group, step.symmetric, step.clip_search)
        expected_scale, zero = grid.choose(originals[name].double())
        assert torch.equal(scale, expected_scale)
        assert torch.equal(q, affine.quantize(originals[name].double(), scale, zero, bits, step.symmetric))
        if not step.symmetric:
            assert torch.equal(parameters(graph)[name + "_zero"], zero)


@pytest.mark.parametrize("grid", ["nf", "uniform"])
def test_codebooks(grid: str) -> None:
    step = QuantizeWeights(bits=3, head=None, group_size=64, grid=grid)
    graph = check(wide(), [step, FoldConstants()])
    table = codebook(grid, 3)
    assert torch.equal(parameters(graph)[f"codebooks.{grid}3"], table)
    originals = parameters(wide())
    assert len(weights(graph)) == 14
    for name, (codes, scale) in weights(graph).items():
        w = originals[name].double()
        assert torch.equal(scale, absmax(w, 64)) and codes.dtype == torch.uint8
        assert torch.equal(codes, encode(w, scale, table))
    assert difference(graph, apply_passes(wide(), [step])) < 1e-6


def test_grids_that_were_methods_go_on_working() -> None:
    with pytest.warns(FutureWarning, match=r"`method: nf` is `method: rtn, grid: nf` now.*goes in 0\.3"):
        step = make_pass({"quantize-weights": {"method": "nf"}})
    assert step == QuantizeWeights(grid="nf") and step.options() == {"grid": "nf"}


def test_the_graph_dequantizes_its_integers() -> None:
    graph = apply_passes(wide(), [QuantizeWeights(), FoldConstants()])
    known = {n.name: v for n, v in values(graph, torch.tensor([[1, 2]]))}
    assert count(graph, "dequantize") == 15
    for node in graph.graph.nodes:
        if is_op(node, "dequantize"):
            name = str(node.args[0].target).removesuffix("_q")
            q, scale = weights(graph)[name]
            torch.testing.assert_close(known[node.name], q * scale.repeat_interleave(32, 1), rtol=0, atol=0)


def test_accounting_counts_scales_and_zero_points() -> None:
    step = QuantizeWeights(bits=3, group_size=16, symmetric=False, head=None)
    graph = apply_passes(wide(), [step, FoldConstants()])
    found = weigh(graph)
    inner = sum(q.numel() for q, _ in weights(graph).values())
    assert found.by_bits[3] == inner
    assert found.bits == inner * 3 + inner // 16 * (16 + 3) + found.by_bits[32] * 32


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


def test_head_targets_and_exclusions() -> None:
    graph = apply_passes(wide(), [QuantizeWeights(head=None, targets=("up_proj", "lm_head"))])
    report = history(graph)[-1].report
    assert count(graph, "dequantize") == len(report.changed) == 2
    assert len(report.left) == 14 and dict(report.left)["lm_head"] == "left in floating point by the options"
    graph = apply_passes(wide(), [QuantizeWeights(exclude=("re:.*mlp.*",))])
    assert count(graph, "dequantize") == 9


def test_mixed_precision_is_two_passes() -> None:
    graph = apply_passes(
        wide(), [QuantizeWeights(bits=8, targets="down_proj"), QuantizeWeights(bits=3), FoldConstants()]
    )
    left = dict(history(graph)[1].report.left)
    assert "quantize-embedding rounds it" in left.pop("model.embed_tokens.weight")
    assert left == {f"model.layers.{i}.mlp.down_proj": "its weight is quantized already" for i in (0, 1)}
    bits = [argument(n, "bits") for n in graph.graph.nodes if is_op(n, "dequantize")]
    assert sorted(bits) == [3] * 12 + [4] + [8] * 2


def test_gptq_loses_less_than_rounding() -> None:
    """On what the graph computes; and its integers stand where the columns stood."""
    tokens = tokens_for(wide(), 6, 60)
    known = {"bits": 3, "group_size": 32, "head": None}
    errors = []
    for options in ({}, {"method": "gptq"}, {"method": "gptq", "act_order": True}):
        graph = apply_passes(wide(), [QuantizeWeights(**known, **options)], calibration=tokens)
        assert count(graph, "dequantize") == 14
        errors.append(float((run(graph, tokens) - run(wide(), tokens)).pow(2).mean()))
    assert max(errors[1:]) < 0.9 * errors[0]
    assert not any(n.op == "get_attr" and n.target.endswith("up_proj.weight") for n in graph.graph.nodes)


def test_gptq_quantizes_what_the_passes_wrote_about_a_weight() -> None:
    """A weight under expressions (fused, rotated) gives what the same weight folded first gives."""
    tokens, step = tokens_for(wide(), 4, 32), QuantizeWeights(method="gptq", head=None)
    before = [FuseNorm(), Rotate()]
    lazy = apply_passes(wide(), [*before, step], calibration=tokens)
    folded = apply_passes(wide(), [*before, FoldConstants(), step], calibration=tokens)
    assert difference(lazy, folded) < 1e-3


def test_groups_of_eight_bits() -> None:
    """Groups that are asked for are made, at eight bits too; a head of eight beside fewer has rows."""

    def scales(**options: Any) -> dict[str, int]:
        graph = apply_passes(wide(), [QuantizeWeights(**options), FoldConstants()])
        return {name: scale.shape[1] for name, (_, scale) in weights(graph).items()}

    assert {*scales(bits=8, head=8).values()} == {1}
    assert {*scales(bits=8, head=8, group_size=None).values()} == {1}
    assert {*scales(bits=8, head=8, group_size=16).values()} == {4, 8}
    eight = scales(group_size=32, head=8)
    assert eight.pop("lm_head.weight") == 1 and {*eight.values()} == {2, 4}


def test_errors() -> None:
    with pytest.raises(
        PassError, match=r"groups of 256 do not divide .*, whose width is 64; use 16 or 32 or"
    ):
        apply_passes(wide(), [QuantizeWeights(group_size=256)])
    for bits in (1, 9):
        with pytest.raises(PassError, match=f"bits must be 2 to 8, found {bits}"):
            QuantizeWeights(bits=bits)
    for group in (1, "some"):
        with pytest.raises(
            PassError, match=rf"group_size must be 2 or more, None or 'auto', found {group!r}"
        ):
            QuantizeWeights(group_size=group)  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"method must be one of .*, found 'awq'"):
        QuantizeWeights(method="awq")
    with pytest.raises(PassError, match="gptq rounds onto the grid 'int', found 'nf'"):
        QuantizeWeights(method="gptq", grid="nf")
    with pytest.raises(PassError, match="expected the name of a grid, found 'fp4'; there are int"):
        QuantizeWeights(grid="fp4")
    with pytest.raises(PassError, match="a codebook has no zero points"):
        QuantizeWeights(grid="nf", symmetric=False)
    with pytest.raises(
        PassError, match="quantize-weights looks at data and was given none: pass calibration"
    ):
        apply_passes(wide(), [QuantizeWeights(method="gptq")])
    with pytest.raises(PassError, match=r"expected calibration tokens int64 \[N, S\], found torch.float32"):
        apply_passes(wide(), [QuantizeWeights(method="gptq")], calibration=torch.zeros(2, 3))
    with pytest.raises(PassError, match="tokens of a vocabulary of 97, found 5 to 97: they are another tok"):
        apply_passes(wide(), [QuantizeWeights(method="gptq")], calibration=torch.tensor([[5, 97]]))


def test_a_graph_in_another_type_is_refused() -> None:
    with pytest.raises(
        PassError, match=r"expected a graph in torch.float32, found torch.float64; convert it"
    ):
        apply_passes(captured("llama"), [QuantizeWeights(group_size=None)])


@pytest.mark.parametrize("grid", ["int", "nf"])
@pytest.mark.parametrize("rank", [16, 12])
def test_branches_are_left_unless_they_are_named(rank: int, grid: str) -> None:
    """Whether groups divide the rank does not decide what becomes of them."""
    adapted = apply_passes(captured("llama", torch.float32), [AddLoRA(rank=rank)])
    found = apply_passes(adapted, [QuantizeWeights(group_size=8, grid=grid)])
    report = history(found)[-1].report
    assert len(report.changed) == 15 and not any("lora_" in entry for entry in report.changed)
    left = [reason for name, reason in report.left if "lora_" in name]
    assert len(left) == 28 and {*left} == {"a low-rank branch: name it in targets, or run merge-lora first"}
    named = apply_passes(adapted, [QuantizeWeights(8, None, targets=("lora_A", "lora_B"), grid=grid)])
    assert len(history(named)[-1].report.changed) == 28
