"""InsertHadamard puts transforms where they cancel."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS, chosen
from helpers import captured, check_exact, count
from torch import fx

from rolora_passes import FoldConstants, FuseNorm, InsertHadamard, Rotate, apply_passes, history
from rolora_passes.errors import PassError, PassOrderError
from rolora_passes.graphs.bases.inference import infer_bases
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.info import info
from rolora_passes.graphs.running import values


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_keeps_the_function(name: str) -> None:
    check_exact(captured(name), [InsertHadamard(), FoldConstants()])


def test_what_a_llama_becomes() -> None:
    graph = apply_passes(captured("llama"), [InsertHadamard(), FoldConstants()])
    turned = [n for n in graph.graph.nodes if is_op(n, "hadamard")]
    assert [n.args[1] for n in turned] == [8, 8, 40, 8, 8, 40]
    for node in graph.graph.nodes:
        if is_op(node, "attention"):
            assert [is_op(a, "hadamard") for a in node.args[:3]] == [True, True, False]
        if is_op(node, "linear") and "down_proj" in node.args[1].target:
            assert is_op(node.args[0], "hadamard")


@pytest.mark.parametrize(("r3", "r4", "expected"), [(True, False, 4), (False, True, 2), (False, False, 0)])
def test_each_kind_alone(r3: bool, r4: bool, expected: int) -> None:
    graph = check_exact(captured("llama"), [InsertHadamard(r3=r3, r4=r4), FoldConstants()])
    assert count(graph, "hadamard") == expected


@pytest.mark.parametrize("block", [2, 4, 8])
def test_blocks(block: int) -> None:
    graph = check_exact(captured("llama"), [InsertHadamard(block=block), FoldConstants()])
    assert {n.args[1] for n in graph.graph.nodes if is_op(n, "hadamard")} == {block}


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_factors_keep_the_function(name: str) -> None:
    check_exact(captured(name), [InsertHadamard(factors=True), FoldConstants()])


def test_factors_are_those_of_the_hadamard_until_others_are_given() -> None:
    plain = apply_passes(captured("llama"), [InsertHadamard()])
    factors = apply_passes(captured("llama"), [InsertHadamard(factors=True)])
    assert count(factors, "kronecker") == count(plain, "hadamard") and not count(factors, "hadamard")
    tokens = torch.tensor([[1, 2, 3]])
    found = [
        [v for n, v in values(graph, tokens) if is_op(n, "hadamard", "kronecker") and v.dim() > 2]
        for graph in (plain, factors)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    manifest = info(factors).rotations
    given = {key: torch.linalg.qr(torch.randn(entry.size, entry.size))[0] for key, entry in manifest.items()}
    assert {"model.layers.0.self_attn.R3", "model.layers.1.mlp.R4"} <= set(given)
    other = check_exact(captured("llama"), [InsertHadamard(factors=True, given=given), FoldConstants()])
    assert {entry.method for entry in info(other).rotations.values()} == {"given"}


def test_factors_are_no_class_of_their_own() -> None:
    """Nothing may change the basis of a transform's matrix behind its back."""
    graph = apply_passes(captured("llama"), [InsertHadamard(factors=True)])
    for cls in infer_bases(graph).classes:
        if any("rotations." in str(axis) for axis in cls.parameters):
            assert not cls.free


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model.layers.9.mlp.R4": torch.eye(40)}, "fit no transform"),
        ({"model.layers.0.mlp.R4": torch.eye(20)}, "40 x 40"),
        ({"model.layers.0.mlp.R4": torch.ones(40, 40)}, "to be orthogonal"),
    ],
)
def test_bad_factors(given: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(PassError, match=message):
        apply_passes(captured("llama"), [InsertHadamard(factors=True, given=given)])
    with pytest.raises(PassError, match="need factors: true"):
        InsertHadamard(given=given)


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(PassError, match="blocks of 16 do not divide an axis of"):
        apply_passes(captured("llama"), [InsertHadamard(block=16)])
    with pytest.raises(PassError, match="no Hadamard of order 6 is known"):
        InsertHadamard(block=6)


def test_free_queries_and_keys_are_left_to_rotate() -> None:
    report = history(apply_passes(captured("opt"), [FuseNorm(), InsertHadamard()]))[-1].report
    assert {reason.split(":")[0] for _, reason in report.left} == {"queries and keys are free"}


def test_an_outlier_is_spread() -> None:
    """The largest of what the down projection reads, against its root mean square, goes down."""

    def peak(graph: fx.GraphModule) -> float:
        target = next(n for n in graph.graph.nodes if is_op(n, "linear") and "down_proj" in str(n.args[1]))
        tokens = torch.tensor([[1, 2, 3]])
        value = next(v for n, v in values(graph, tokens) if n is target.args[0])
        return float((value.abs().amax(-1) / value.pow(2).mean(-1).sqrt()).mean())

    graph = apply_passes(captured("llama"), [FuseNorm(), Rotate(), FoldConstants()])
    assert peak(apply_passes(graph, [InsertHadamard(), FoldConstants()])) < peak(graph)


def test_twice_is_refused() -> None:
    with pytest.raises(PassOrderError, match="already 'hadamards inserted'"):
        apply_passes(captured("llama"), [InsertHadamard(), InsertHadamard()])
