"""Tracked errors are those of the two graphs' values, and say where they begin."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from helpers import captured, tokens_for
from rich.console import Console
from subjects import QUANTIZED, ROTATED, recipe, twins, wide, with_tensor
from torch import Tensor

from rolora_passes import AddLoRA, QuantizeWeights, apply_passes
from rolora_passes.debugging import ErrorTrace, float_twin_recipe, track_errors, with_float_twin
from rolora_passes.debugging.tables import trace_table
from rolora_passes.errors import GraphFormatError, PassError
from rolora_passes.evaluation.sensitivity import split_recipe
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.running import run, values
from rolora_passes.graphs.text import graph_text
from rolora_passes.passes.rilq import RILQ
from rolora_passes.passes.tune_lora import TuneLoRA
from rolora_passes.recipes import load_recipe


def tracked(groups: bool = False) -> tuple[ErrorTrace, Tensor]:
    twin, quantized = twins(groups)
    tokens = tokens_for(wide(), 2, 12)
    return track_errors(quantized, twin, tokens), tokens


def test_figures_are_those_of_the_values() -> None:
    trace, tokens = tracked()
    twin, quantized = twins()
    theirs = {node.name: value.double() for node, value in values(twin, tokens) if node.op == "call_function"
              and isinstance(value, Tensor) and value.is_floating_point()}  # fmt: skip
    ours = {node.name: value for node, value in values(quantized, tokens)}
    assert len(trace.nodes) == 22  # embedding, 15 linears, 2 attentions, 4 sums; the head is the logits
    assert trace.nodes[0].kind == "embedding" and trace.nodes[0].sqnr == math.inf  # in floating point
    for node in trace.nodes[1:]:
        expected = theirs[node.name].flatten(2)
        difference = ours[node.name].double().flatten(2) - expected
        ratio = float(difference.square().sum() / expected.square().sum())
        assert node.sqnr == pytest.approx(-10 * math.log10(ratio), abs=1e-3)
        assert node.relative == pytest.approx(math.sqrt(ratio), rel=1e-4)
        assert node.max_abs == pytest.approx(float(expected.abs().max()), rel=1e-6)
        assert node.max_error == pytest.approx(float(difference.abs().max()), rel=1e-4)
        by_token = difference.norm(dim=-1) / expected.norm(dim=-1)
        worst = node.worst[0]
        assert worst.error == pytest.approx(float(by_token.max()), rel=1e-4)
        assert divmod(int(by_token.argmax()), 12) == (worst.window, worst.position)
        assert worst.token == int(tokens[worst.window, worst.position])
        assert [t.error for t in node.worst] == sorted((t.error for t in node.worst), reverse=True)


def test_logits() -> None:
    trace, tokens = tracked()
    twin, quantized = twins()
    p, q = (torch.log_softmax(run(graph, tokens).double(), -1) for graph in (twin, quantized))
    assert trace.nodes[-1].kind == "logits" and trace.nodes[-1].site == "lm_head"
    assert trace.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
    assert trace.nll == pytest.approx(
        float((p - q)[:, :-1].gather(-1, tokens[:, 1:, None]).mean()), rel=1e-2, abs=1e-6
    )
    assert trace.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_names_kinds_and_layers() -> None:
    trace, _ = tracked()
    by_label = {node.label: node for node in trace.nodes}
    assert by_label["model.layers.1.self_attn.q_proj"].layer == 1
    assert by_label["layer 0 attention (attention)"].layer == 0
    assert by_label["embedding (embedding)"].layer is None
    assert {node.layer for node in trace.nodes if node.kind == "add"} == {0, 1}
    assert not trace.skipped


def test_the_first_value_below_a_threshold() -> None:
    twin, quantized = twins()
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    broken = with_tensor(quantized, name, lambda scale: scale.mul_(3))
    trace = track_errors(broken, twin, tokens_for(wide(), 2, 12))
    first = trace.first_below(10)
    assert first is not None and first.site == "model.layers.0.self_attn.o_proj"
    assert trace.first_below(-100) is None
    lost = with_tensor(quantized, name, lambda scale: scale.mul_(float("nan")))
    first = track_errors(lost, twin, tokens_for(wide(), 2, 12)).first_below(-100)
    assert first is not None and first.site == "model.layers.0.self_attn.o_proj"


def test_a_graph_has_no_error_against_itself() -> None:
    twin, _ = twins()
    trace = track_errors(twin, twin, tokens_for(wide()))
    assert all(node.relative == 0 and node.sqnr == math.inf and not node.worst for node in trace.nodes)
    assert (trace.kl, trace.top1, trace.first_below(1000)) == (0, 1, None)
    assert json.loads(json.dumps(trace.row(), allow_nan=False))["nodes"][0]["sqnr"] is None


def test_values_are_compared_window_by_window_and_freed() -> None:
    twin, quantized = twins()
    tokens, done = tokens_for(wide(), 3, 5), list[tuple[int, int]]()
    trace = track_errors(quantized, twin, tokens, lambda number, of: done.append((number, of)))
    assert done[0] == (1, 66) and done[-1] == (66, 66) and trace.tokens == (3, 5)


@pytest.mark.parametrize("name", ["phi", "mixtral"])
def test_every_architecture(name: str) -> None:
    graph = captured(name, torch.float32)
    steps = recipe(*ROTATED, {"quantize-weights": {"group_size": None, "bits": 8}}, "fold-constants")
    twin, quantized = with_float_twin(graph, steps, verify=False)
    trace = track_errors(quantized, twin, tokens_for(graph, 2, 6))
    assert not trace.skipped and trace.kl < 0.5
    assert sum(node.kind == "attention" for node in trace.nodes) == 2
    assert all(0 < node.relative < 1 for node in trace.nodes if node.kind == "linear")


def test_what_cannot_be_compared_is_said() -> None:
    twin, quantized = twins()
    other = apply_passes(twin, [{"add-lora": {"rank": 2, "targets": ["q_proj"]}}], verify=False)
    trace = track_errors(other, quantized, tokens_for(wide()))
    assert trace.skipped and all(reason == "the other graph has no such value" for _, reason in trace.skipped)
    llama = captured("opt", torch.float32)
    wider = with_tensor(wide(), "lm_head.weight", lambda w: None)
    head = parameters(wider)["lm_head.weight"]
    wider.lm_head.weight = torch.nn.Parameter(head[:50].clone())
    with pytest.raises(GraphFormatError, match="logits of different shapes"):
        track_errors(wider, wide(), tokens_for(llama))


def test_twins_share_what_comes_before_the_first_quantizer() -> None:
    steps = recipe(*ROTATED, *QUANTIZED)
    before, exact, rest = float_twin_recipe(steps)
    assert [s.name for s in before] == ["fuse-norm", "rotate", "insert-hadamard"]
    assert [s.name for s in exact] == ["fold-constants"] and rest == steps[3:]
    records: list[str] = []
    twin, quantized = with_float_twin(wide(), steps, on_pass=lambda record: records.append(record.name))
    assert records == [step.name for step in steps]
    assert "quantize" not in graph_text(twin) and "fake_quantize" in graph_text(quantized)
    with pytest.raises(PassError, match="expected a recipe with a pass that quantizes, found fuse-norm"):
        float_twin_recipe(recipe("fuse-norm"))


def test_training_before_the_first_quantizer_is_no_loss() -> None:
    """Both twins have it: what a site loses is what rounding loses. What repairs rounding is the recipe's."""
    steps = load_recipe("rolora-rtn:W4A4")
    before, exact, rest = float_twin_recipe(steps)
    names = [step.name for step in before]
    assert names[-4:] == ["add-lora", "tune-lora", "merge-lora", "fold-constants"]
    assert [step.name for step in exact] == ["fold-constants"] and rest[0].name == "quantize-weights"
    assert split_recipe(steps)[0] == before
    steps = [QuantizeWeights(), AddLoRA(), RILQ(steps=2)]
    assert float_twin_recipe(steps)[1] == [AddLoRA()]
    with pytest.raises(PassError, match="expected a recipe with a pass that quantizes, found add-lora, tune"):
        float_twin_recipe([AddLoRA(), TuneLoRA()])


def test_the_table() -> None:
    trace, _ = tracked(groups=True)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(trace_table(trace, 5, 30, lambda token: f"<{token}>"))
    text = console.export_text()
    first = trace.first_below(30)
    assert first is not None and f"{first.label} ({first.sqnr:.1f} dB) is the first value below 30 dB" in text
    assert "The 5 lowest SQNRs of 22 values, in graph order" in text and text.count("'<") == 5
    assert f"KL {trace.kl:.4f}" in text


def test_gradients_are_left_as_they_were() -> None:
    graph = captured("llama", torch.float32)
    track_errors(graph, graph, tokens_for(graph, 1, 6))
    assert torch.is_grad_enabled()
