"""A graph cut at its layers computes what the graph does, and so do its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import captured, tokens_for
from torch import Tensor, fx

from rolora_passes import FuseNorm, InsertHadamard, Rotate, apply_passes
from rolora_passes.graphs.bases.rotations import dense
from rolora_passes.graphs.graph import get_tensor, parameters
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.running import run
from rolora_passes.learning import end_to_end
from rolora_passes.learning.end_to_end import EndToEnd
from rolora_passes.learning.layered import LayeredGraph
from rolora_passes.learning.loop import Windows
from rolora_passes.learning.losses import LOSSES
from rolora_passes.passes.setting import Setting, quantizers
from rolora_passes.quantize.quantizers import straighten

ROTATED = [FuseNorm(), Rotate(), InsertHadamard(factors=True)]


def open_graph(name: str = "llama", setting: str = "W4A4KV4") -> fx.GraphModule:
    steps = [p for p in quantizers(Setting.parse(setting), "rtn") if p.name != "fold-constants"]
    graph = apply_passes(captured(name, torch.float32), [*ROTATED, *steps], verify=False)
    straighten(graph)
    return graph


def logits(layered: LayeredGraph, *given: Any) -> Tensor:
    return layered.logits(*layered(*given))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "phi3", "mixtral", "gemma2", "gpt2"])
def test_computes_what_the_graph_does(name: str) -> None:
    graph = captured(name)
    layered, tokens = LayeredGraph(graph), tokens_for(graph)
    assert len(layered.layers) == 2
    assert layered.head is not None and layered.by_token
    assert torch.equal(logits(layered, inputs_for(graph, tokens), {}), run(graph, tokens))


def test_with_quantizers_and_variables() -> None:
    graph = open_graph()
    names = [n for n in parameters(graph) if n.startswith("rotations.")]
    given = {name: dense(get_tensor(graph, name)).float() for name in names}
    layered, tokens = LayeredGraph(graph, names), tokens_for(graph)
    inputs = inputs_for(graph, tokens)
    torch.testing.assert_close(logits(layered, inputs, given), run(graph, tokens), rtol=0.2, atol=0.05)
    other = {**given, "rotations.R1": -given["rotations.R1"].flip(0)}
    assert not torch.equal(logits(layered, inputs, other), logits(layered, inputs, given))


def test_gradients_are_the_same_if_layers_are_computed_again() -> None:
    graph = open_graph(setting="W4A16")
    names = [n for n in parameters(graph) if n.startswith("rotations.")]
    layered, tokens = LayeredGraph(graph, names), tokens_for(graph)
    inputs, found = inputs_for(graph, tokens), []
    for recompute in (False, True):
        given = {n: dense(get_tensor(graph, n)).float().requires_grad_() for n in names}
        logits(layered, inputs, given, recompute).logsumexp(-1).mean().backward()
        found.append([value.grad for value in given.values()])
    for plain, again in zip(*found, strict=True):
        assert plain is not None and float(plain.abs().max()) > 0
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("loss", ["cross-entropy", *LOSSES])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_few_tokens_at_a_time_are_the_same_loss(
    name: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, plain = open_graph(name, "W4A16"), captured(name, torch.float32)
    names = [n for n in parameters(graph) if n.startswith("rotations.")]
    student, teacher = LayeredGraph(graph, names), None if loss == "cross-entropy" else LayeredGraph(plain)
    tokens, found = tokens_for(graph), []
    labels = tokens.masked_fill(torch.arange(tokens.shape[1]) < 3, -100)
    for step in (5, tokens.numel()):
        monkeypatch.setattr(end_to_end, "_TOKENS", step)
        given = {n: dense(get_tensor(graph, n)).float().requires_grad_() for n in names}
        objective = EndToEnd(student, teacher, loss, bfloat16=False, recompute=True)
        total = objective(Windows(tokens, labels), given)
        (2 * total).backward()
        found.append([total, *(value.grad for value in given.values())])
    for some, whole in zip(*found, strict=True):
        assert some is not None and float(some.detach().abs().max()) > 0
        torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-6)
    if loss == "cross-entropy":
        every = run(graph, tokens)[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(every, labels[:, 1:].flatten(), ignore_index=-100)
        torch.testing.assert_close(found[0][0].detach(), expected, rtol=0.05, atol=0)


def test_layers_hold_their_own_weights_frozen() -> None:
    layered = LayeredGraph(captured("llama"))
    assert not any(p.requires_grad for p in layered.parameters())
    for number, layer in enumerate(layered.layers):
        matrices = [name for name, p in layer.named_parameters() if p.dim() == 2]
        assert matrices and all(f"layers.{number}." in name for name in matrices)
