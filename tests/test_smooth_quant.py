"""SmoothQuant keeps the function, equalises what it says, and names what it leaves."""

from __future__ import annotations

import functools

import pytest
import torch
from architectures import SOME, tiny
from helpers import captured, check_exact, count, difference, tokens_for
from test_observe_activations import tiny as two_linears
from torch import Tensor, fx

from rolora_passes import AddLoRA, FoldConstants, FuseNorm, InsertHadamard, Rotate, apply_passes, history
from rolora_passes.errors import PassError, PassOrderError
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.dtypes import convert
from rolora_passes.graphs.facts import facts
from rolora_passes.graphs.graph import linears, parameters, set_tensor, site_names
from rolora_passes.graphs.running import values
from rolora_passes.graphs.text import graph_text
from rolora_passes.passes.base import Report
from rolora_passes.passes.observe_activations import ObserveActivations
from rolora_passes.passes.smooth_quant import SmoothQuant


@functools.cache
def observed(name: str) -> fx.GraphModule:
    return observe(captured(name))


def observe(graph: fx.GraphModule, **options: object) -> fx.GraphModule:
    step = ObserveActivations(**{"per": "channel", **options})  # type: ignore[arg-type]
    return apply_passes(graph, [step], calibration=tokens_for(graph, 4, 9))


def report_of(graph: fx.GraphModule) -> Report:
    return next(r.report for r in history(graph) if r.name == "smooth-quant")


def sites(graph: fx.GraphModule) -> list[str]:
    return [line.rpartition(": by ")[0] for line in report_of(graph).changed[1:]]


def inputs(graph: fx.GraphModule, tokens: Tensor) -> dict[str, Tensor]:
    """The greatest magnitude of every channel of what each linear reads, by site."""
    names = site_names(graph)
    read = {n.args[0]: [] for n in linears(graph)}
    for node in linears(graph):
        read[node.args[0]].append(names[node])
    found = {}
    for node, value in values(graph, tokens):
        for name in read.get(node, ()):
            found[name] = value.abs().reshape(-1, value.shape[-1]).amax(0)
    return found


ENDS = [(name, alpha) for name in ("llama", "opt", "gemma", "mixtral") for alpha in (0.0, 1.0)]


@pytest.mark.parametrize(("name", "alpha"), [*((name, 0.5) for name in SOME), *ENDS])
def test_keeps_the_function(name: str, alpha: float) -> None:
    graph = check_exact(observed(name), [SmoothQuant(alpha=alpha)])
    assert len(sites(graph)) >= 4
    check_exact(graph, [FoldConstants()])


@pytest.mark.parametrize("name", ["llama", "opt", "gemma", "gpt2"])
def test_other_passes_follow(name: str) -> None:
    check_exact(
        apply_passes(observed(name), [SmoothQuant()]),
        [FuseNorm(), Rotate(), InsertHadamard(r3=False), FoldConstants()],
    )


def test_adapters_are_scaled_with_what_they_read() -> None:
    graph = observe(apply_passes(captured("llama"), [AddLoRA(rank=2)]))
    done = check_exact(graph, [SmoothQuant()])
    assert any("lora" in s and "q_proj" in s and "v_proj" in s for s in sites(done))


def test_what_a_llama_becomes() -> None:
    done = apply_passes(observed("llama"), [SmoothQuant()])
    layer = "model.layers.0"
    assert sites(done)[:4] == [
        f"{layer}.self_attn.q_proj, {layer}.self_attn.k_proj, {layer}.self_attn.v_proj",
        f"{layer}.self_attn.o_proj",
        f"{layer}.mlp.gate_proj, {layer}.mlp.up_proj",
        f"{layer}.mlp.down_proj",
    ]
    assert len(sites(done)) == 9 and not report_of(done).left
    assert {n.args[0].name for n in linears(done)} <= report_of(done).moved
    lines = graph_text(done).splitlines()
    smoothing, gain = f"{layer}.self_attn.q_proj.smoothing", f"{layer}.input_layernorm.weight"
    (divided,) = [line for line in lines if gain in line and "div" in line]
    assert divided.endswith(f"div({gain}, {smoothing})")
    multiplied = [line for line in lines if "= mul(" in line and line.endswith(f".weight, {smoothing})")]
    assert len(multiplied) == 3
    shapes = {name: tuple(p.shape) for name, p in parameters(done).items() if name.endswith("smoothing")}
    assert len(shapes) == 9 and shapes[f"{layer}.self_attn.o_proj.smoothing"] == (8,)


def test_observers_and_their_fact_are_gone() -> None:
    done = apply_passes(observed("llama"), [SmoothQuant()])
    assert not count(done, "observed") and not any("input_low" in name for name in parameters(done))
    assert report_of(done).changed[0] == "9 observers removed"
    assert SmoothQuant.removes == ("activations observed",)
    assert "activations observed" not in facts(done)


def test_alpha_one_makes_every_input_channel_one() -> None:
    graph = captured("llama")
    done = apply_passes(observed("llama"), [SmoothQuant(alpha=1.0)])
    tokens = tokens_for(graph, 4, 9)
    assert float(inputs(graph, tokens)["lm_head"].amax() - inputs(graph, tokens)["lm_head"].amin()) > 1
    for name, largest in inputs(done, tokens).items():
        over_heads = largest.reshape(4, 8).amax(0) if name.endswith("o_proj") else largest
        assert torch.allclose(over_heads, torch.ones_like(over_heads)), name


@pytest.mark.parametrize("target", ["down_proj", "lm_head", "up_proj", "o_proj"])
def test_alpha_zero_makes_every_weight_channel_one(target: str) -> None:
    done = apply_passes(observed("llama"), [SmoothQuant(alpha=0.0, targets=target), FoldConstants()])
    weights: dict[object, Tensor] = {}
    for node, name in site_names(done).items():
        if name.split(".")[-1] in {target, "gate_proj" if target == "up_proj" else target}:
            largest = parameters(done)[node.args[1].target].abs().amax(0)
            weights[node.args[0]] = torch.maximum(largest, weights.get(node.args[0], largest))
    assert weights
    for largest in weights.values():
        over_heads = largest.reshape(4, 8).amax(0) if target == "o_proj" else largest
        assert torch.allclose(over_heads, torch.ones_like(over_heads))


def test_half_way_input_and_weight_are_equally_large() -> None:
    graph, tokens = captured("opt"), tokens_for(captured("opt"), 4, 9)
    before, names = inputs(graph, tokens), site_names(graph)
    weight = next(parameters(graph)[n.args[1].target] for n, s in names.items() if s.endswith("0.fc2"))
    site = "model.decoder.layers.0.fc2"
    done = apply_passes(observed("opt"), [SmoothQuant(targets="re:.*0.fc2"), FoldConstants()])
    found = next(parameters(done)[n.args[1].target] for n, s in site_names(done).items() if s == site)
    alive = before[site] > 0
    assert alive.any() and not torch.allclose(before[site], weight.abs().amax(0))
    assert torch.allclose(inputs(done, tokens)[site][alive], found.abs().amax(0)[alive])


def test_channels_that_are_always_zero_are_left() -> None:
    model = tiny("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[3] = 0  # never positive: the input of fc2 is zero
        model.model.decoder.layers[0].fc1.bias[3] = -1
        model.model.decoder.layers[0].fc2.weight[:, 5] = 0
    for alpha in (0.0, 0.5, 1.0):
        done = check_exact(observe(capture(model)), [SmoothQuant(alpha=alpha)])
        s = parameters(done)["model.decoder.layers.0.fc2.smoothing"]
        assert s[3] == s[5] == 1 and s.isfinite().all() and (s > 0).all() and (s != 1).sum() > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_stay(dtype: torch.dtype) -> None:
    graph = convert(captured("llama"), dtype)
    done = apply_passes(observe(graph), [SmoothQuant()])
    assert len(sites(done)) == 9
    tokens = tokens_for(graph)
    assert (
        done(tokens, torch.arange(9).expand(3, 9)).dtype == graph(tokens, torch.arange(9).expand(3, 9)).dtype
    )
    assert {p.dtype for n, p in parameters(done).items() if n.endswith("smoothing")} == {dtype}


def test_scales_that_half_precision_cannot_hold_are_left() -> None:
    graph, site = observe(convert(captured("llama"), torch.float16)), "model.layers.0.mlp.down_proj"
    for end, sign in (("low", -1), ("high", 1)):
        bound = parameters(graph)[f"{site}.input_{end}"].detach().clone()
        bound[:3] = sign * torch.tensor([1e-30, 1e30, 4.0])
        set_tensor(graph, f"{site}.input_{end}", bound)
    done = apply_passes(graph, [SmoothQuant(alpha=1.0, targets="down_proj")])
    assert parameters(done)[f"{site}.smoothing"][:3].tolist() == [1, 1, 4]


# What is left, and errors.


def test_targets() -> None:
    done = check_exact(observed("llama"), [SmoothQuant(targets=("k_proj", "re:.*1.mlp.down_proj"))])
    assert [s.split(".")[-1] for s in sites(done)] == ["v_proj", "v_proj", "down_proj"]
    left = dict(report_of(done).left)
    assert len(left) == 6 and set(left.values()) == {"not smoothed by the options"}


def test_after_fuse_norm_the_norms_readers_are_left_with_the_remedy() -> None:
    graph = observe(apply_passes(captured("llama"), [FuseNorm()]))
    done = check_exact(graph, [SmoothQuant()])
    assert [s.split(".")[-1] for s in sites(done)] == ["o_proj", "down_proj"] * 2
    for _, reason in report_of(done).left:
        assert "rms_norm" in reason and "run smooth-quant before fuse-norm" in reason


def test_a_gelus_linear_is_left_with_the_operator() -> None:
    left = dict(report_of(apply_passes(observed("starcoder2"), [SmoothQuant()])).left)
    assert list(left) == [f"model.layers.{i}.mlp.c_proj" for i in (0, 1)]
    assert all("gelu" in reason and "before fuse-norm" not in reason for reason in left.values())


def test_nothing_to_smooth_still_says_that_observers_went() -> None:
    graph = observe(apply_passes(captured("llama"), [FuseNorm()]))
    done = check_exact(graph, [SmoothQuant(targets="lm_head")])
    assert report_of(done).changed == ["9 observers removed"]


def test_what_was_not_observed_is_left() -> None:
    done = check_exact(observe(captured("llama"), targets="down_proj"), [SmoothQuant()])
    assert [s.split(".")[-1] for s in sites(done)] == ["down_proj"] * 2
    assert all("run observe-activations with targets" in reason for _, reason in report_of(done).left)


def test_one_observed_reader_is_enough_for_a_value() -> None:
    done = check_exact(observe(captured("llama"), targets="q_proj"), [SmoothQuant()])
    assert [s.split(".")[-1] for s in sites(done)] == ["v_proj", "v_proj"]


def test_per_tensor_observers_are_refused_with_the_remedy() -> None:
    graph = observe(captured("llama"), per="tensor")
    with pytest.raises(PassError, match=r"o_proj to be observed per channel.*with per: channel first"):
        apply_passes(graph, [SmoothQuant(targets="o_proj")])


def test_a_graph_without_observers_is_refused() -> None:
    with pytest.raises(PassOrderError, match="requires a graph with 'activations observed'"):
        apply_passes(captured("llama"), [SmoothQuant()])


def test_options_and_targets_are_checked() -> None:
    for alpha in (-0.1, 1.5):
        with pytest.raises(PassError, match=f"alpha must be from 0 to 1, found {alpha}"):
            SmoothQuant(alpha=alpha)
    with pytest.raises(PassError, match="no linear matches 'x_proj'"):
        apply_passes(observed("llama"), [SmoothQuant(targets="x_proj")])


def test_scales_by_hand() -> None:
    """x = table rows of tokens 0 to 3; a and b read it through I and 2I, so max|W| is 2."""
    graph = apply_passes(
        two_linears(), [ObserveActivations(per="channel")], calibration=torch.tensor([[0, 1], [2, 3]])
    )
    done = apply_passes(graph, [SmoothQuant(alpha=0.75)])
    expected = torch.tensor([7.0, 8, 9], dtype=torch.float64) ** 0.75 / 2**0.25
    assert torch.allclose(parameters(done)["a.smoothing"], expected)
    assert difference(done, graph) < 1e-12
