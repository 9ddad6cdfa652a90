"""Shapes: numbers, symbols, and what cannot be told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import captured
from torch import Tensor, fx

from rolora_passes.errors import GraphFormatError
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.running import run
from rolora_passes.graphs.shapes import BATCH, SEQUENCE, infer_shapes, infer_static, infer_symbols

aten = torch.ops.aten


def traced(forward: Callable[[Tensor, Tensor], object]) -> fx.GraphModule:
    return fx.GraphModule(torch.nn.Module(), fx.Tracer().trace(forward))


def named(graph: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in graph.graph.nodes if n.name == name)


def test_numbers_and_symbols_are_those_of_a_run() -> None:
    graph = captured("llama")
    numbers, symbols = infer_shapes(graph), infer_symbols(graph)
    sizes = {"batch": BATCH, "length": SEQUENCE}
    for node, value in numbers.items():
        if isinstance(value, Tensor):
            known, dtype = symbols[node]
            assert value.is_meta and value.dtype == dtype
            assert all(
                k is None or sizes.get(str(k), k) == n for k, n in zip(known, value.shape, strict=True)
            )
    (output,) = graph.graph.find_nodes(op="output")
    logits = run(graph, torch.zeros(3, 5, dtype=torch.int64))
    assert symbols[output] == (("batch", "length", logits.shape[-1]), logits.dtype)
    for name, value in parameters(graph).items():
        assert numbers[named(graph, name.replace(".", "_"))].shape == value.shape


def test_what_follows_from_a_length_is_no_length() -> None:
    def forward(tokens: Tensor, positions: Tensor) -> Tensor:
        twice = aten.cat.default([tokens, positions], 1)
        return aten.add.Tensor(twice, 1)  # type: ignore[no-any-return]

    graph = traced(forward)
    twice, output = named(graph, "cat_default"), named(graph, "output")
    assert infer_symbols(graph)[output][0] == ("batch", None)
    assert infer_shapes(graph)[twice].shape == (BATCH, 2 * SEQUENCE)
    assert twice not in infer_static(graph, {"tokens": (1, None), "positions": (1, None)})
    assert infer_static(graph, {"tokens": (1, None), "positions": (1, 3)})[named(graph, "tokens")][0] == (
        1,
        None,
    )


def test_a_graph_for_one_length_alone_is_refused_where_names_are_asked_for() -> None:
    def forward(tokens: Tensor, positions: Tensor) -> Tensor:
        return aten.view.default(tokens, [-1, SEQUENCE])  # type: ignore[no-any-return]

    graph = traced(forward)
    assert infer_shapes(graph)[named(graph, "output")].shape == (BATCH, SEQUENCE)
    with pytest.raises(GraphFormatError, match="shapes hold for any length"):
        infer_symbols(graph)


def test_a_value_that_depends_on_data_is_unknown_and_so_is_what_reads_it() -> None:
    def forward(tokens: Tensor, positions: Tensor) -> Tensor:
        chosen = aten.nonzero.default(tokens)
        return aten.add.Tensor(aten.item.default(aten.sum.default(chosen)), positions)  # type: ignore[no-any-return]

    found = infer_shapes(traced(forward))
    assert {node.name for node, value in found.items() if value is None} >= {
        "nonzero_default",
        "item_default",
        "add_tensor",
    }


def test_only_what_is_asked_for_is_looked_at() -> None:
    graph = captured("llama")
    (weight, *_) = graph.graph.find_nodes(op="get_attr")
    found = infer_shapes(graph, only={weight})
    assert [node for node, value in found.items() if value is not None] == [weight]
