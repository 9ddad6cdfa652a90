"""Scalings: what may be divided by s, what then takes it, and every way it could go wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

import pytest
import torch
from architectures import CONFIGS, chosen
from helpers import captured, difference
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import KEEPING, Builder, Impossible, tokens
from test_bases import between, call, fused
from torch import Tensor, fx

from rolora_passes.graphs.bases.inference import ParameterAxis
from rolora_passes.graphs.bases.scalings import Scaling, apply_scaling, find_scalings, largest
from rolora_passes.graphs.expressions import Expressions
from rolora_passes.graphs.graph import add_parameter, constants, copy_graph, finish, site_names
from rolora_passes.graphs.running import run as logits
from rolora_passes.graphs.running import values
from rolora_passes.graphs.text import graph_text
from rolora_passes.graphs.verify import relative_error

aten, rolora = torch.ops.aten, torch.ops.rolora
Grow = Callable[[fx.Graph, fx.Node, Callable[[Tensor], fx.Node]], fx.Node]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scaled(graph: fx.GraphModule, numbers: list[int], seed: int = 0) -> tuple[fx.GraphModule, list[Tensor]]:
    """A copy with a random s applied to the chosen sites, and these s."""
    result, generator = copy_graph(graph), torch.Generator().manual_seed(seed)
    sites, expressions = find_scalings(result), Expressions(result)
    drawn = []
    for number in numbers:
        s = torch.rand(sites[number].size, dtype=torch.float64, generator=generator) * 3 + 0.2
        apply_scaling(result, expressions, sites[number], add_parameter(result, "s", s))
        drawn.append(s)
    return finish(result), drawn


def admissible(graph: fx.GraphModule) -> list[int]:
    return [i for i, site in enumerate(find_scalings(graph)) if site.reason is None]


def activations(graph: fx.GraphModule) -> dict[str, Tensor]:
    """What is not constant and not whole, by name."""
    known = constants(graph)
    found = {n.name: v for n, v in values(graph, tokens()) if n not in known and isinstance(v, Tensor)}
    return {name: value for name, value in found.items() if value.is_floating_point()}


def check_scalings(graph: fx.GraphModule) -> None:
    """Every scaling alone and all together keep the output, and each divides what it says."""
    expected = logits(graph, tokens())
    for number in admissible(graph):
        (site,), (result, (s,)) = [find_scalings(graph)[number]], scaled(graph, [number])
        error = relative_error(logits(result, tokens()), expected)
        assert error < 1e-9, f"{site} moves the output by {error:.1e}\n{graph_text(graph)}"
        before, after = activations(graph), activations(result)
        for reading in site.inputs:
            along = s.repeat_interleave(reading.inner).repeat(reading.outer)
            name = reading.value.name
            assert torch.allclose(after[name] * along, before[name], rtol=1e-9, atol=1e-9), site
        moved = {name for name, value in before.items() if not torch.allclose(after[name], value)}
        assert moved <= site.moved, graph_text(graph)
    together, _ = scaled(graph, admissible(graph))
    assert relative_error(logits(together, tokens()), expected) < 1e-9, graph_text(graph)


# Random graphs with many products and few operators that make everything rigid.


def _gain(b: Builder) -> fx.Node:
    x = b.any(lambda s: s[-1:] and s[-1] > 1 and s[-1] < 13)
    y = b.param(b.size(x)[-1])
    if b.choose.random() < 0.3:
        y = b.call(aten.add.Tensor, y, 1.0)
    return b.call(aten.mul.Tensor, *((x, y) if b.choose.random() < 0.5 else (y, x)))


def _gated(b: Builder) -> fx.Node:
    x, out = b.any(lambda s: s[-1:] and s[-1] < 13), b.choose.choice((2, 4, 6))
    left, right = (b.call(aten.linear.default, x, b.param(out, b.size(x)[-1])) for _ in "ab")
    shape = b.choose.choice((aten.silu.default, aten.relu.default, aten.neg.default, aten.abs.default))
    return b.call(aten.mul.Tensor, b.call(shape, left), right)


def _affine_norm(b: Builder) -> fx.Node:
    x = b.any(lambda s: s[-1:] and 1 < s[-1] < 13)
    width = b.size(x)[-1]
    if b.choose.random() < 0.4:
        return b.call(aten.rms_norm.default, x, [width], b.param(width), 1e-3)
    bias = b.param(width) if b.choose.random() < 0.7 else None
    return b.call(aten.layer_norm.default, x, [width], b.param(width), bias, 1e-2)


MINE: list[Callable[[Builder], fx.Node]] = [
    _gain, _gain, _gated, _gated, _affine_norm,
    lambda b: b.call(aten.relu.default, b.any()),
    lambda b: b.call(aten.leaky_relu.default, b.any(), 0.2),
    lambda b: (lambda x: b.call(aten.mul.Tensor, x, b.any(lambda s: s == b.size(x))))(b.any()),
]  # fmt: skip


def products(seed: int, length: int) -> fx.GraphModule:
    builder = Builder(Random(seed))
    builder.start()
    for _ in range(length):
        if builder.choose.random() < 0.6:
            builder.grow(builder.choose.choice(KEEPING))
            continue
        try:
            builder.pool.append(builder.choose.choice(MINE)(builder))
        except (Impossible, IndexError):
            continue
    return builder.finish()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 20))
def test_every_scaling_keeps_the_function_of_random_graphs(seed: int, length: int) -> None:
    check_scalings(products(seed, length))


def test_random_graphs_have_scalings_past_products_and_without() -> None:
    sites = [s for seed in range(60) for s in find_scalings(products(seed, 8))]
    found = [s for s in sites if s.reason is None]
    past = [s for s in found if {a.node for a in s.divide} and len(s.moved) > 1 and len(s.divide) == 1]
    assert len(found) > 15 and past and len(sites) - len(found) > 15


# One operator at a time, between an embedding [B, S, 4] (p1, or the one read before it) and a linear.


def site_of(graph: fx.GraphModule) -> Scaling:
    return find_scalings(graph)[-1]


def linear(width: int = 4, bias: bool = True) -> Grow:
    def grow(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
        terms = [tensor(normal(width, 4, seed=3)), *([tensor(normal(width, seed=4))] if bias else [])]
        return g.call_function(aten.linear.default, (x, *terms))

    return grow


def then(*steps: Grow) -> Grow:
    def grow(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
        for step in steps:
            x = step(g, x, tensor)
        return x

    return grow


def gated(shape: object) -> Grow:
    def grow(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
        left = g.call_function(shape, (linear()(g, x, tensor),))  # type: ignore[arg-type]
        return g.call_function(aten.mul.Tensor, (left, linear()(g, x, tensor)))

    return grow


NORM = call(aten.rms_norm.default, [4], None, 1e-3)
CENTRED = call(aten.layer_norm.default, [4], None, None, 1e-3)
GAIN, BIAS = call(aten.mul.Tensor, normal(4)), call(aten.add.Tensor, normal(4, seed=2))


def one_plus(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
    gain = g.call_function(aten.add.Tensor, (tensor(normal(4)), 1.0))
    return g.call_function(aten.mul.Tensor, (x, gain))


ADMISSIBLE: dict[str, tuple[Grow, set[str], set[str]]] = {
    "a gain": (then(NORM, GAIN), {"p2 0"}, set()),
    "a gain and a bias": (then(CENTRED, GAIN, BIAS), {"p2 0", "p3 0"}, set()),
    "one plus a gain": (then(NORM, one_plus), {"p2 0"}, set()),
    "a gain before a relu": (then(NORM, GAIN, call(aten.relu.default)), {"p2 0"}, set()),
    "two gains": (then(NORM, GAIN, GAIN), {"p3 0"}, set()),
    "an rms norm with its gain": (call(aten.rms_norm.default, [4], normal(4), 1e-3), {"p2 0"}, set()),
    "a layer norm with gain and bias": (
        call(aten.layer_norm.default, [4], normal(4), normal(4, seed=2), 1e-3), {"p2 0", "p3 0"}, set()
    ),
    "a layer norm with a gain": (call(aten.layer_norm.default, [4], normal(4), None, 1e-3), {"p2 0"}, set()),
    "a relu": (then(NORM, linear(), call(aten.relu.default)), {"p2 0", "p3 0"}, set()),
    "a leaky relu": (then(NORM, linear(), call(aten.leaky_relu.default, 0.1)), {"p2 0", "p3 0"}, set()),
    "a magnitude": (then(NORM, linear(), call(aten.abs.default)), {"p2 0", "p3 0"}, set()),
    "a gate": (then(NORM, gated(aten.silu.default)), {"p4 0", "p5 0"}, set()),
    "a gate that is itself homogeneous": (then(NORM, gated(aten.relu.default)), {"p2 0", "p3 0"}, set()),
    "a linear alone": (then(NORM, linear()), {"p2 0", "p3 0"}, set()),
    "a number multiplied": (then(NORM, linear(), call(aten.mul.Tensor, 0.5)), {"p2 0", "p3 0"}, set()),
}  # fmt: skip


def axes(found: tuple[ParameterAxis, ...]) -> set[str]:
    return {f"{a.parameter.removesuffix('.weight')} {a.dim}" for a in found}


@pytest.mark.parametrize("case", ADMISSIBLE)
def test_what_takes_the_scale(case: str) -> None:
    grow, divided, multiplied = ADMISSIBLE[case]
    graph = between(grow)
    check_scalings(graph)
    site = site_of(graph)
    assert site.reason is None and site.size == 4
    head = axes(site.weights)
    assert len(head) == 1 and axes(site.divide) == divided and axes(site.multiply) == multiplied | head


def _shared_up(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
    """One linear's result in two products, read apart."""
    x = NORM(g, x, tensor)
    up = linear()(g, x, tensor)
    both = [
        g.call_function(aten.mul.Tensor, (g.call_function(aten.silu.default, (linear()(g, x, tensor),)), up))
        for _ in "ab"
    ]
    other = g.call_function(aten.linear.default, (both[0], tensor(normal(4, 4, seed=9))))
    joined = g.call_function(aten.silu.default, (other,))
    wide = g.call_function(aten.linear.default, (joined, tensor(normal(4, 4, seed=8))))
    return g.call_function(aten.add.Tensor, (wide, linear()(g, both[1], tensor)))


def _value_read_elsewhere(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
    gained = GAIN(g, NORM(g, x, tensor), tensor)
    bent = g.call_function(aten.tanh.default, (gained,))
    return g.call_function(aten.add.Tensor, (bent, linear()(g, gained, tensor)))


def _shared_gain(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
    """Two norms with one gain: one read by a linear, one by a tanh."""
    gain = tensor(normal(4))
    first = g.call_function(aten.mul.Tensor, (NORM(g, x, tensor), gain))
    inner = linear()(g, g.call_function(aten.tanh.default, (first,)), tensor)
    return g.call_function(aten.mul.Tensor, (NORM(g, inner, tensor), gain))


def _bias_is_gain(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
    gain = tensor(normal(4))
    return g.call_function(aten.layer_norm.default, (x, [4], gain, gain, 1e-3))


def _squared(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
    y = linear()(g, NORM(g, x, tensor), tensor)
    return g.call_function(aten.mul.Tensor, (y, y))


def _split_gate(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
    """A product whose operand is made of heads."""
    x = NORM(g, x, tensor)
    heads = [g.call_function(aten.unflatten.int, (linear(8)(g, x, tensor), -1, [2, 4])) for _ in "ab"]
    out = g.call_function(rolora.attention.default, (heads[0], heads[0], heads[1], 0.5))
    flat = g.call_function(aten.flatten.using_ints, (out, -2, -1))
    gate = g.call_function(aten.sigmoid.default, (linear(8)(g, x, tensor),))
    y = g.call_function(aten.mul.Tensor, (gate, flat))
    return g.call_function(aten.linear.default, (y, tensor(normal(4, 8, seed=9))))


def _beside(g: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
    """x [B, 4, S] times its own mean over S: an axis that is scaled stands beside the last one."""
    x = NORM(g, x, tensor)
    columns = g.call_function(aten.transpose.int, (linear()(g, x, tensor), 1, 2))
    weight = g.call_function(aten.transpose.int, (linear()(g, x, tensor), 1, 2))
    product = g.call_function(aten.mul.Tensor, (columns, weight))
    return g.call_function(aten.transpose.int, (product, 1, 2))


REFUSED: dict[str, tuple[Grow, str]] = {
    "nothing between norm and linear": (NORM, "rms_norm .* keeps lengths only"),
    "a gelu": (then(NORM, linear(), call(aten.gelu.default)), "gelu .* acts on every element for itself"),
    "a silu gate alone": (then(NORM, linear(), call(aten.silu.default)), "silu"),
    "a square": (then(NORM, _squared), "mul .* multiplies the axis by itself"),
    "a power": (then(NORM, linear(), call(aten.square.default)), "square"),
    "a number added": (then(NORM, linear(), call(aten.add.Tensor, 0.5)), "adds the same number"),
    "a relu of a norm": (then(NORM, call(aten.relu.default)), "rms_norm .* keeps lengths only"),
    "a product with another namespace's mul": (
        then(NORM, linear(), call(torch.ops.fuzz.mul.default)), "without a rule"
    ),
    "a gain of one number": (then(NORM, call(aten.mul.Tensor, normal(1))), "rms_norm"),
    "a gain for two": (_shared_gain, "mul .* reads it too"),
    "a gain that is also the bias": (_bias_is_gain, "layer_norm"),
    "a value that a tanh reads": (_value_read_elsewhere, "tanh"),
    "another axis of a product": (_beside, "mul .* has the axis beside the one it scales"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case: str) -> None:
    grow, reason = REFUSED[case]
    graph = between(grow)
    check_scalings(graph)
    site = site_of(graph)
    if case == "a value that a tanh reads":
        site = find_scalings(graph)[0]
    assert site.reason is not None
    assert re.search(reason, site.reason), site.reason
    assert not site.divide and not site.multiply


def test_a_value_in_two_products_is_refused_by_both() -> None:
    graph = between(then(_shared_up))
    check_scalings(graph)
    reasons = [s.reason for s in find_scalings(graph) if any("mul" in r.value.name for r in s.inputs)]
    assert len(reasons) == 2 and all(r is not None and "reads it too" in r for r in reasons)


def test_heads_beside_a_gate_are_refused() -> None:
    graph = between(_split_gate)
    check_scalings(graph)
    (site,) = [s for s in find_scalings(graph) if any("mul" in r.value.name for r in s.inputs)]
    assert site.reason is not None and "takes the axis apart into factors" in site.reason


# Real models.


def found(name: str, graph: fx.GraphModule | None = None) -> dict[str, str | None]:
    """By the last parts of the linears' names, of the first layer and the head: the reason."""
    graph = graph or captured(name)
    names = site_names(graph)
    result = {}
    for site in find_scalings(graph):
        linears = [names[n] for n in site.linears]
        if not any(".1." in n and not n.endswith(".1") for n in linears):
            result[" ".join(n.split(".layers.0.")[-1].split(".", 1)[-1] for n in linears)] = site.reason
    return result


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_scalings_keep_the_function_of_models(name: str) -> None:
    graph = captured(name)
    numbers = admissible(graph)
    assert len(numbers) >= 4
    assert difference(scaled(graph, numbers)[0], graph) < 1e-10


def test_a_llamas_scalings() -> None:
    graph = captured("llama")
    sites = {s.linears: s for s in find_scalings(graph)}
    names = site_names(graph)
    table = {
        " ".join(names[n].split(".")[-1] for n in linears): (axes_of(s.divide), axes_of(s.multiply))
        for linears, s in sites.items()
        if not any(".1." in names[n] for n in linears)
    }
    assert table == {
        "q_proj k_proj v_proj": (
            {"input_layernorm 0"}, {"q_proj 1", "k_proj 1", "v_proj 1"}
        ),
        "o_proj": ({"v_proj 0 2x8"}, {"o_proj 1 4x8"}),
        "gate_proj up_proj": ({"post_attention_layernorm 0"}, {"gate_proj 1", "up_proj 1"}),
        "down_proj": ({"up_proj 0"}, {"down_proj 1"}),
        "lm_head": ({"norm 0"}, {"lm_head 1"}),
    }  # fmt: skip


def axes_of(found: tuple[ParameterAxis, ...]) -> set[str]:
    heads = [f" {a.outer}x{a.size}" if a.outer > 1 else "" for a in found]
    return {f"{a.parameter.split('.')[-2]} {a.dim}{h}" for a, h in zip(found, heads, strict=True)}


@pytest.mark.parametrize(
    ("name", "blocked"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("opt", {"lm_head": "also an embedding's table"}),
        ("gemma", {"lm_head": "also an embedding's table"}),
        ("gpt2", {"c_proj": "tanh", "lm_head": "also an embedding's table"}),
        ("gpt_neox", {"dense_4h_to_h": "gelu"}),
        ("mixtral", {}),
    ],
)
def test_what_models_leave(name: str, blocked: dict[str, str]) -> None:
    left = {site: reason for site, reason in found(name).items() if reason}
    assert len(left) == len(blocked), left
    for site, reason in blocked.items():
        (why,) = [r for s, r in left.items() if s.endswith(site)]
        assert why is not None and reason in why


def test_a_relus_linear_takes_the_scale_with_its_bias() -> None:
    graph = captured("opt")
    names = site_names(graph)
    (site,) = [s for s in find_scalings(graph) if names[s.linears[0]].endswith("0.fc2")]
    assert [a.parameter.split(".", 4)[-1] for a in site.divide] == ["fc1.weight", "fc1.bias"]


def test_a_mixtures_experts_are_read_with_their_router() -> None:
    graph = captured("mixtral")
    names = site_names(graph)
    (site,) = [s for s in find_scalings(graph) if names[s.linears[0]].endswith("0.mlp.gate")]
    assert {a.parameter.split("mlp.")[1] for a in site.weights} == {"gate.weight", "experts.gate_up_proj"}
    assert {a.parameter.split(".")[-2] for a in site.divide} == {"post_attention_layernorm"}


def test_fused_norms_leave_heads_and_gates() -> None:
    left = found("llama", fused("llama"))
    assert {s for s, r in left.items() if r is None} == {"o_proj", "down_proj"}


def test_the_largest_magnitude_over_heads() -> None:
    graph = captured("llama")
    (site,) = [s for s in find_scalings(graph) if s.size == 8][:1]
    weight = dict(graph.named_buffers()) | dict(graph.named_parameters())
    (axis,) = site.weights
    expected = weight[axis.parameter].abs().amax(0).reshape(4, 8).amax(0)
    assert torch.equal(largest(graph, axis), expected)
    (written,) = site.divide
    expected = weight[written.parameter].abs().amax(1).reshape(2, 8).amax(0)
    assert torch.equal(largest(graph, written), expected)
    value = torch.arange(24, dtype=torch.float64).reshape(6, 4)
    graph = between(lambda g, x, t: g.call_function(aten.linear.default, (x, t(-value))))
    (node,) = [n for n in graph.graph.nodes if n.target == "p2.weight"]
    assert largest(graph, ParameterAxis(node, 0, 1, 3, 2, False)).tolist() == [7, 15, 23]
    assert largest(graph, ParameterAxis(node, 0, 3, 2, 1, False)).tolist() == [19, 23]
