"""Facts are functions of a graph, true however it came about; and every graph is a legal one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from architectures import CONFIGS, chosen
from helpers import captured
from torch import fx

from rolora_passes import FoldConstants, FuseNorm, Pass, Report, Rotate, apply_passes, history
from rolora_passes.errors import GraphFormatError, NoSiteWarning, PassError, PassOrderError
from rolora_passes.graphs.facts import FACTS, Fact, add_fact, facts, require_legal
from rolora_passes.graphs.graph import aten, copy_graph, finish, insert_after, is_op, parameters
from rolora_passes.graphs.serialize import load_graph, save_graph

# What establishes each fact, from a captured LLaMA in float32.
ESTABLISHING = {
    "norms fused": ["fuse-norm"],
    "folded": ["fuse-norm", "fold-constants"],
    "rotated": ["fuse-norm", "rotate", "fold-constants"],
    "scalings inserted": ["fuse-norm", "insert-scaling", "fold-constants"],
    "hadamards inserted": ["insert-hadamard"],
    "activations observed": ["observe-activations"],
    "weights quantized": [{"quantize-weights": {"group_size": 8}}],
    "embedding quantized": ["quantize-embedding"],
    "activations quantized": [{"quantize-activations": {"float_weights": True}}],
    "cache quantized": ["quantize-kv-cache"],
}


@pytest.mark.parametrize("fact", ESTABLISHING)
def test_each_fact_holds_after_its_pass_and_of_the_saved_graph(fact: str, tmp_path: Path) -> None:
    before = captured("llama", torch.float32)
    assert fact == "folded" or fact not in facts(before)
    after = apply_passes(before, ESTABLISHING[fact], calibration=torch.arange(12).reshape(2, 6))
    assert fact in facts(after)
    assert facts(load_graph(save_graph(after, tmp_path / "graph.safetensors"))) == facts(after)


def test_every_fact_has_such_a_test_or_another() -> None:
    assert {*FACTS} == {
        *ESTABLISHING,
        "canonical",
        "kv cache",
    }  # tests/graphs/test_canonical, test_add_kv_cache


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_captured_graphs_are_canonical_and_fused_ones_fused(name: str) -> None:
    assert "canonical" in facts(captured(name))
    assert "norms fused" in facts(apply_passes(captured(name), [FuseNorm()]))


def test_a_gain_put_back_by_hand_is_seen() -> None:
    graph = copy_graph(apply_passes(captured("llama"), [FuseNorm(), FoldConstants()]))
    assert "norms fused" in facts(graph)
    norm = next(n for n in graph.graph.nodes if is_op(n, "rms_norm"))
    gain = next(n for n in graph.graph.nodes if n.target == "model.layers.0.mlp.down_proj.weight")
    with graph.graph.inserting_after(gain):
        row = graph.graph.call_function(aten.select.int, (gain, 1, 0))
    insert_after(graph, norm, aten.mul.Tensor, norm, row)
    (scaled,) = [u for u in norm.users if is_op(u, "mul")]
    norm.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    finish(graph)
    assert "norms fused" not in facts(graph)
    with pytest.raises(PassOrderError, match=r"rotate requires a graph with 'norms fused'"):
        apply_passes(graph, [Rotate()])


@dataclass(frozen=True)
class Claims(Pass):
    """Says that it rotated, and did nothing."""

    ensures: ClassVar[tuple[str, ...]] = ("rotated",)
    found: bool = True

    def run(self, graph: fx.GraphModule) -> Report:
        return Report(changed=["everything"] if self.found else [], left=[("residual", "it was not to be")])


@dataclass(frozen=True)
class Wants(Pass):
    requires: ClassVar[tuple[str, ...]] = ("rotated",)

    def run(self, graph: fx.GraphModule) -> Report:
        return Report(changed=["something"])


def test_a_claim_that_does_not_hold_is_refused() -> None:
    with pytest.raises(PassError, match=r"claims says that it leaves .*'rotated', but there is no rotation"):
        apply_passes(captured("llama"), [Claims()])


def test_a_pass_without_a_site_says_so_and_ensures_nothing() -> None:
    with pytest.warns(NoSiteWarning, match=r"claims found no site. residual: it was not to be"):
        graph = apply_passes(captured("llama"), [Claims(found=False)])
    assert "no site found" in str(history(graph)[-1])
    with (
        pytest.warns(NoSiteWarning),
        pytest.raises(PassOrderError, match=r"wants requires a graph with 'rotated'.*run rotate first"),
    ):
        apply_passes(captured("llama"), [Claims(found=False), Wants()])


def test_a_pass_may_bring_a_fact_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Big(Pass):
        requires: ClassVar[tuple[str, ...]] = ("big",)

        def run(self, graph: fx.GraphModule) -> Report:
            return Report(changed=["it"])

    with pytest.raises(PassError, match=r"found 'big': say what it means with .*add_fact"):
        apply_passes(captured("llama"), [Big()])
    monkeypatch.setitem(FACTS, "big", FACTS["folded"])  # so that it goes again
    add_fact(Fact("big", lambda g: None if len(parameters(g)) > 99 else "it is small", "take more layers"))
    with pytest.raises(PassOrderError, match=r"requires a graph with 'big'.*take more layers"):
        apply_passes(captured("llama"), [Big()])


def _mutating(graph: fx.GraphModule) -> None:
    node = next(n for n in graph.graph.nodes if is_op(n, "rms_norm"))
    insert_after(graph, node, aten.add_.Tensor, node, 1.0)


def _foreign(graph: fx.GraphModule) -> None:
    node = next(n for n in graph.graph.nodes if is_op(n, "rms_norm"))
    insert_after(graph, node, print, node)


def _module(graph: fx.GraphModule) -> None:
    graph.add_module("lm_head", torch.nn.Identity())
    output = graph.graph.output_node()
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_module("lm_head", output.args),)


def _two(graph: fx.GraphModule) -> None:
    output = graph.graph.output_node()
    output.args = ((output.args[0], output.args[0]),)


def _another_input(graph: fx.GraphModule) -> None:
    with graph.graph.inserting_after(graph.graph.find_nodes(op="placeholder")[-1]):
        graph.graph.placeholder("mask")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_mutating, r"`add_.*` writes into its operand"),
        (_foreign, "`print.*` calls .*print.*, which is no operator"),
        (_module, "`lm_head` is a call_module, which no pass looks into"),
        (_two, "it returns .*, not one tensor"),
        (_another_input, "its inputs are tokens, positions, mask"),
    ],
)
def test_an_illegal_graph_is_refused_whoever_made_it(
    spoil: Callable[[fx.GraphModule], None], message: str
) -> None:
    @dataclass(frozen=True)
    class Spoil(Pass):
        def run(self, graph: fx.GraphModule) -> Report:
            spoil(graph)
            graph.recompile()
            return Report(changed=["it"])

    with pytest.raises(GraphFormatError, match=r"expected a legal graph after spoil: .*" + message):
        apply_passes(captured("llama"), [Spoil()], verify=False)
    graph = copy_graph(captured("llama"))
    spoil(graph)
    with pytest.raises(GraphFormatError, match=message):
        require_legal(graph, "somebody")
    with pytest.raises(GraphFormatError, match=r"a legal graph from .*capture: .*" + message):
        apply_passes(graph, [FuseNorm()])
