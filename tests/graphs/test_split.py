"""A graph cut at its layers computes what the graph does, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, tokens_for
from torch import fx

from rolora_passes import FuseNorm, InsertHadamard, Rotate, apply_passes
from rolora_passes.graphs.bases.rotations import dense
from rolora_passes.graphs.graph import get_tensor, parameters
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.running import run
from rolora_passes.learning.layered import LayeredGraph
from rolora_passes.passes.setting import Setting, quantizers
from rolora_passes.quantize.quantizers import straighten

ROTATED = [FuseNorm(), Rotate(), InsertHadamard(factors=True)]


def open_graph(name: str = "llama", setting: str = "W4A4KV4") -> fx.GraphModule:
    steps = [p for p in quantizers(Setting.parse(setting), "rtn") if p.name != "fold-constants"]
    graph = apply_passes(captured(name, torch.float32), [*ROTATED, *steps], verify=False)
    straighten(graph)
    return graph


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "phi3", "mixtral", "gemma2", "gpt2"])
def test_computes_what_the_graph_does(name: str) -> None:
    graph = captured(name)
    layered, tokens = LayeredGraph(graph), tokens_for(graph)
    assert len(layered.layers) == 2
    assert torch.equal(layered(inputs_for(graph, tokens), {})["result"], run(graph, tokens))


def test_with_quantizers_and_variables() -> None:
    graph = open_graph()
    names = [n for n in parameters(graph) if n.startswith("rotations.")]
    given = {name: dense(get_tensor(graph, name)).float() for name in names}
    layered, tokens = LayeredGraph(graph, names), tokens_for(graph)
    inputs = inputs_for(graph, tokens)
    torch.testing.assert_close(layered(inputs, given)["result"], run(graph, tokens), rtol=0.2, atol=0.05)
    other = {**given, "rotations.R1": -given["rotations.R1"].flip(0)}
    assert not torch.equal(layered(inputs, other)["result"], layered(inputs, given)["result"])


def test_gradients_are_the_same_if_layers_are_computed_again() -> None:
    graph = open_graph(setting="W4A16")
    names = [n for n in parameters(graph) if n.startswith("rotations.")]
    layered, tokens = LayeredGraph(graph, names), tokens_for(graph)
    inputs, found = inputs_for(graph, tokens), []
    for recompute in (False, True):
        given = {n: dense(get_tensor(graph, n)).float().requires_grad_() for n in names}
        layered(inputs, given, recompute)["result"].logsumexp(-1).mean().backward()
        found.append([value.grad for value in given.values()])
    for plain, again in zip(*found, strict=True):
        assert plain is not None and float(plain.abs().max()) > 0
        torch.testing.assert_close(plain, again)


def test_layers_hold_their_own_weights_frozen() -> None:
    layered = LayeredGraph(captured("llama"))
    assert not any(p.requires_grad for p in layered.parameters())
    for number, layer in enumerate(layered.layers):
        matrices = [name for name, p in layer.named_parameters() if p.dim() == 2]
        assert matrices and all(f"layers.{number}." in name for name in matrices)
