"""Stages: the values of a plain run, each computed once, and no more of them kept than are read later."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import captured, tokens_for
from torch import Tensor, fx

from rolora_passes import FuseNorm, Rotate, apply_passes
from rolora_passes.graphs import evaluate
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import (
    add_parameter,
    constants,
    copy_graph,
    get_tensor,
    insert,
    is_op,
    linears,
    upstream,
)
from rolora_passes.graphs.running import run, values
from rolora_passes.numerics.affine import Integers, quantize
from rolora_passes.quantize import stages as module
from rolora_passes.quantize.stages import Stages

rolora = torch.ops.rolora


def inputs(graph: fx.GraphModule) -> list[fx.Node]:
    """The values that linears read, in graph order, and the logits."""
    return [*dict.fromkeys(sorted(n.args[0] for n in linears(graph))), logits(graph)]  # type: ignore[type-var]


def exhaust(windows: Iterator[Tensor]) -> None:
    for value in windows:
        del value


def logits(graph: fx.GraphModule) -> fx.Node:
    (output,) = graph.graph.find_nodes(op="output")
    result: fx.Node = output.args[0]
    return result


def plain(graph: fx.GraphModule, tokens: Tensor) -> list[dict[fx.Node, Any]]:
    return [dict(values(graph, window)) for window in tokens.split(1)]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.Node, Any]]:
    """Every operator call from here on, with a weak reference to its result."""
    made: list[tuple[fx.Node, Any]] = []
    whole = module.call

    def call(node: fx.Node, value_of: Callable[[fx.Node], Any], *dtype: Any) -> Any:
        result = whole(node, value_of, *dtype)
        made.append((node, weakref.ref(result) if isinstance(result, Tensor) else None))
        return result

    for place in (module, evaluate):  # what windows compute, and what they share
        monkeypatch.setattr(place, "call", call)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gemma3", "mixtral", "cohere"])
def test_values_are_those_of_a_plain_run(name: str) -> None:
    graph = captured(name)
    tokens = tokens_for(graph)
    expected, windows = plain(graph, tokens), Stages(graph, tokens)
    for node in inputs(graph):
        found = list(windows.advance(node))
        assert len(found) == len(tokens)
        for value, known in zip(found, expected, strict=True):
            assert torch.equal(value, known[node]), node


def test_constant_expressions_and_dequantized_parameters_are_shared() -> None:
    graph = apply_passes(captured("llama"), [FuseNorm(), Rotate()])
    quantize_in_place(graph, linears(graph)[3])
    tokens = tokens_for(graph)
    expected, windows = plain(graph, tokens), Stages(graph, tokens)
    for node in inputs(graph):
        for value, known in zip(windows.advance(node), expected, strict=True):
            assert torch.equal(value, known[node]), node


def test_a_stage_for_every_node_gives_every_value() -> None:
    graph = captured("qwen3")
    tokens = tokens_for(graph, 2)
    expected, windows = plain(graph, tokens), Stages(graph, tokens)
    for node in graph.graph.nodes:
        if node.op == "call_function":
            for value, known in zip(windows.advance(node), expected, strict=True):
                assert torch.equal(value, known[node]), node


EMBEDDING = torch.ops.aten.embedding.default


def quantize_in_place(graph: fx.GraphModule, linear: fx.Node) -> None:
    weight = compute(graph, [linear.args[1]])[0]  # type: ignore[arg-type]
    scale, zero = Integers(3, 8).choose(weight)
    integers = add_parameter(graph, f"{linear.name}.q", quantize(weight, scale, zero, 3, True))
    scales = add_parameter(graph, f"{linear.name}.scale", scale.to(weight.dtype))
    linear.update_arg(1, insert(graph, linear, rolora.dequantize.default, integers, scales, None, 3))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3", "mixtral"])
def test_what_is_rewritten_on_the_way_is_what_runs(name: str) -> None:
    graph = copy_graph(captured(name))
    tokens = tokens_for(graph)
    before, windows = run(graph, tokens), Stages(graph, tokens)
    last = logits(graph)
    for node in inputs(graph)[:-1]:
        exhaust(windows.advance(node))
        for user in list(node.users):
            if is_op(user, "linear") and user is not last:
                quantize_in_place(graph, user)
    found = list(windows.advance(logits(graph)))
    graph.graph.lint()
    for value, known in zip(found, plain(graph, tokens), strict=True):
        assert torch.equal(value, known[logits(graph)])
    assert not torch.allclose(torch.cat(found), before)


def test_all_stages_together_are_one_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = apply_passes(captured("qwen2"), [FuseNorm()])
    tokens = tokens_for(graph, 4)
    made = calls(monkeypatch)
    windows, steps = Stages(graph, tokens), inputs(graph)
    for node in steps:
        exhaust(windows.advance(node))
    counts = Counter(node for node, _ in made)
    (token_input, _) = graph.graph.find_nodes(op="placeholder")
    for node in graph.graph.nodes:
        if node.op == "call_function":
            if token_input in upstream([node]):
                assert counts[node] == len(tokens), node
            else:  # weights, and the rotary tables: once a stage, whatever the number of windows
                assert 1 <= counts[node] <= len(steps), node


def test_what_nothing_reads_any_more_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = apply_passes(captured("llama"), [FuseNorm()])
    tokens = tokens_for(graph, 4)
    known, made = constants(graph), calls(monkeypatch)
    windows = Stages(graph, tokens)
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    for node in inputs(graph):
        exhaust(windows.advance(node))
        alive = {n for n, reference in made if reference is not None and reference() is not None}
        read_later = {
            n for n in order if order[n] <= order[node] and any(order[u] > order[node] for u in n.users)
        }
        assert not alive & known
        assert alive <= read_later
    assert not alive


def test_within_a_stage_values_go_with_their_last_reader() -> None:
    graph = captured("llama")
    tokens = tokens_for(graph, 2)
    order = list(graph.graph.nodes)
    held = []

    class Watch(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            held.append(len(self))

    windows = Stages(graph, tokens)
    windows._windows = [Watch(window) for window in windows._windows]
    exhaust(windows.advance(logits(graph)))
    assert max(held) <= 8 < len(order) / 8


def test_a_reader_that_a_rewrite_took_away_is_not_waited_for() -> None:
    graph = copy_graph(captured("llama"))
    tokens = tokens_for(graph, 2)
    first, second, *_ = inputs(graph)
    windows = Stages(graph, tokens)
    references = [weakref.ref(value) for value in windows.advance(first)]
    for user in list(first.users):  # the projections now read the residual stream itself
        user.replace_input_with(first, graph.graph.find_nodes(op="call_function", target=EMBEDDING)[0])
    found = list(windows.advance(second))
    assert all(reference() is None for reference in references)
    for value, known in zip(found, plain(graph, tokens), strict=True):
        assert torch.equal(value, known[second])


def test_gradients_are_off_within_and_left_alone_outside() -> None:
    graph = captured("llama")
    for value in Stages(graph, tokens_for(graph, 2)).advance(logits(graph)):
        assert torch.is_grad_enabled() and not value.requires_grad


def test_standing_still_or_going_back_is_refused() -> None:
    graph = captured("llama")
    windows = Stages(graph, tokens_for(graph, 2))
    first, second, *_ = inputs(graph)
    list(windows.advance(second))
    for node in (first, second):
        with pytest.raises(AssertionError, match="stands before"):
            next(windows.advance(node))


def test_evaluate_computes_in_the_type_that_is_asked_for() -> None:
    graph = apply_passes(captured("llama", torch.float32), [FuseNorm()])
    weight = linears(graph)[0].args[1]
    assert isinstance(weight, fx.Node) and is_op(weight, "mul")
    first, second = (get_tensor(graph, str(a.target)).detach() for a in weight.all_input_nodes)
    assert compute(graph, [weight])[0].dtype == torch.float32
    assert torch.equal(compute(graph, [weight])[0], first * second)
    assert torch.equal(compute(graph, [weight], dtype=torch.float64)[0], first.double() * second.double())
