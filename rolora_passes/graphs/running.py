"""Running a graph one node at a time: no more of its weights are in memory than what is computed needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from rolora_passes.graphs.buffers import constant_nodes
from rolora_passes.graphs.devices import device_of, place_of
from rolora_passes.graphs.evaluate import SMALL, Change, blocks, call, deaths, let_go, parameter
from rolora_passes.graphs.graph import argument, get_tensor, is_op, parameters, upstream
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.memory import release
from rolora_passes.ondisk import is_on_disk

# Bytes of parameters of a graph that is run at once: at most three times as many are in memory then.
_FEW = 1 << 28

_OFTEN = 16  # large weights after which freed memory is given back: their blocks fragment the heap

Linear = Callable[[fx.GraphModule, fx.Node, Tensor], Tensor | None]
"""(graph, linear, its input [.., in]) -> [.., out]."""


def run(graph: fx.GraphModule, tokens: Tensor, decoder_tokens: Tensor | None = None) -> Tensor:
    """Logits [B, S, V] for tokens int64 [B, S] at positions 0, 1, 2, …, where they are computed.

    An encoder gives what its head does. A graph with a decoder gives logits [B, T, V] for decoder_tokens
    int64 [B, T]: the later half of tokens, if not given. Weights on disk are read as they are needed.
    """
    return run_on(graph, inputs_for(graph, tokens, decoder_tokens))


def run_on(graph: fx.GraphModule, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a graph gives for inputs by name, in its order."""
    tensors, here = parameters(graph).values(), place_of(graph).device == device_of(graph)
    if here and sum(tensor.nbytes for tensor in tensors) <= _FEW and not any(map(is_on_disk, tensors)):
        with torch.no_grad():
            result: Tensor = graph(*inputs.values())
        return result
    *_, (_, result) = values(graph, inputs=inputs)
    return result


def values(
    graph: fx.GraphModule,
    tokens: Tensor | None = None,
    dtype: torch.dtype | None = None,
    change: Change | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    linear: Linear | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Every node that computes with its value, each freed when its last reader has run.

    A parameter is read, and cast, when it is needed, and kept no longer. A constant expression is evaluated
    right before its first reader; one that is a large weight in blocks, and is not among the nodes.

    Args:
        tokens: int64 [B, S].
        dtype: of every floating-point value; None: each in its own.
        change: see `Change`.
        inputs: by name, in place of tokens.
        linear: gives the product of a linear with a large weight, without its bias; None where it does not.
    """
    place = place_of(graph, dtype)
    given = iter((inputs or inputs_for(graph, cast(Tensor, tokens))).values())
    fixed = constant_nodes(graph.graph)
    weights = {n: w for n in graph.graph.nodes if (w := large_weight(graph, n, fixed, linear)) is not None}
    steps = _just_in_time(graph, fixed, weights)
    dead, done, count = deaths(steps, ()), dict[fx.Node, Any](), 0

    def value_of(node: fx.Node) -> Any:
        return parameter(graph, node, place, dtype, change=change) if node.op == "get_attr" else done[node]

    for step in steps:
        with torch.no_grad():  # not around the yield: two streams in step would end in each other's mode
            if step.op == "placeholder":
                done[step] = next(given).to(place.device)
            elif step.op == "output":
                done[step] = fx.node.map_arg(step.args[0], value_of)
            elif step in weights:
                done[step] = _applied(graph, step, weights[step], value_of, dtype, change, linear)
            else:
                done[step] = call(step, value_of, dtype, place.device)
            if dtype is not None:
                done[step] = fx.node.map_aggregate(done[step], lambda v: _cast(v, dtype))
        yield step, done[step]
        if step in weights and (count := count + 1) % _OFTEN == 0:
            release()
        for value in dead[step]:
            done.pop(value, None)
            if value.op == "get_attr":
                let_go(graph, value)


def large_weight(
    graph: fx.GraphModule, node: fx.Node, fixed: set[fx.Node], linear: Linear | None = None
) -> fx.Node | None:
    """The weight of a linear or an embedding that is large, and an expression, or on disk, or known."""
    if not is_op(node, "linear", "embedding") or len(node.args) > 3 or node in fixed:
        return None
    weight = argument(node, "weight")
    if weight not in fixed or argument(node, "bias", None) is weight:
        return None
    roots = [get_tensor(graph, str(n.target)) for n in upstream([weight]) if n.op == "get_attr"]
    plain = weight.op == "get_attr" and not any(map(is_on_disk, roots)) and linear is None
    return None if plain or sum(root.numel() for root in roots) <= SMALL else weight


def _applied(
    graph: fx.GraphModule,
    node: fx.Node,
    weight: fx.Node,
    value_of: Callable[[fx.Node], Any],
    dtype: torch.dtype | None,
    change: Change | None,
    linear: Linear | None,
) -> Tensor:
    """A linear or an embedding, of whose weight a block of rows is in memory at a time."""
    result: Tensor | None = None
    if is_op(node, "embedding"):
        return looked_up(graph, weight, value_of(argument(node, "indices")), dtype, change)
    x, bias = value_of(argument(node, "input")), argument(node, "bias")
    if linear is not None and (product := linear(graph, node, x)) is not None:
        return product if bias is None else product + value_of(bias)
    for place, (part,) in blocks(graph, [weight], dtype, change):
        shift = None if bias is None else value_of(bias)[place.rows]
        found = torch.nn.functional.linear(x, part if dtype is None else _cast(part, dtype), shift)
        result = found.new_empty(*found.shape[:-1], place.count) if result is None else result
        result[..., place.rows] = found
    assert result is not None
    return result


def looked_up(
    graph: fx.GraphModule,
    table: fx.Node,
    tokens: Tensor,
    dtype: torch.dtype | None = None,
    change: Change | None = None,
) -> Tensor:
    """Rows of a table that is a constant expression: where its rows are independent, none but those."""
    only, numbers = tokens.unique(return_inverse=True)
    ((place, (part,)),) = blocks(graph, [table], dtype, change, only)
    return part[numbers if place.rows is only else tokens]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _just_in_time(
    graph: fx.GraphModule, fixed: set[fx.Node], weights: Mapping[fx.Node, fx.Node]
) -> list[fx.Node]:
    """The nodes that compute, each constant one right before the first that reads it."""
    order: dict[fx.Node, None] = {}

    def place(node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand in fixed and operand not in order and operand is not weights.get(node):
                place(operand)
        if node.op != "get_attr":
            order[node] = None

    for node in graph.graph.nodes:
        if node not in fixed:
            place(node)
    return list(order)
