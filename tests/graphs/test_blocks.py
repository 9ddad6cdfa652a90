"""Large weights in blocks of rows, and in no block at all: the same values, whatever is written on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import SOME
from helpers import captured, exactly, tokens_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from rolora_passes import apply_passes
from rolora_passes.errors import VerificationError
from rolora_passes.graphs import evaluate as evaluation
from rolora_passes.graphs import products, running
from rolora_passes.graphs.evaluate import blocks, compute, evaluate, rows_apart
from rolora_passes.graphs.graph import aten, copy_graph, get_tensor, is_op, parameters
from rolora_passes.graphs.products import Products
from rolora_passes.graphs.running import run, values
from rolora_passes.graphs.verify import relative_error, verify_same

RECIPE = ["fuse-norm", "rotate", "insert-hadamard"]


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is too small for blocks, and a block has few rows."""
    for module in (evaluation, running):
        monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(evaluation, "_BLOCK", 64)
    monkeypatch.setattr(running, "_FEW", 0)


def weight_graph(*steps: Any) -> tuple[fx.GraphModule, fx.Node]:
    """An expression over a weight [12, 16]; a step is (node, constant) -> (operator, arguments)."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    graph = fx.GraphModule(module, fx.Graph())

    def constant(*shape: int) -> fx.Node:
        name = f"p{len(list(module.named_parameters()))}"
        value = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
        for owner in (module, graph):
            owner.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        return graph.graph.get_attr(name)

    node = constant(12, 16)
    for step in steps:
        target, arguments = step(node, constant)
        node = graph.graph.call_function(target, arguments)
    graph.graph.output(node)
    return graph, node


ours = torch.ops.rolora
STEPS = {
    "cast": lambda node, c: (aten.to.dtype, (node, torch.float32)),
    "gain": lambda node, c: (aten.mul.Tensor, (node, c(16))),
    "rows": lambda node, c: (aten.mul.Tensor, (node, c(12, 1))),
    "added": lambda node, c: (aten.add.Tensor, (node, c(12, 16))),
    "turn in": lambda node, c: (ours.rotate.default, (node, c(16), 1)),
    "turn out": lambda node, c: (ours.rotate.default, (node, c(12), 0)),
    "dense": lambda node, c: (ours.rotate.default, (node, c(16, 16), -1)),
    "dense out": lambda node, c: (ours.rotate.default, (node, c(4, 4), 0, 3)),
    "hadamard": lambda node, c: (ours.hadamard.default, (node, 8, 1, 2)),
}


@given(names=st.lists(st.sampled_from(sorted(STEPS)), max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_expression(names: list[str]) -> None:
    graph, node = weight_graph(*(STEPS[name] for name in names))
    (expected,) = compute(graph, [node], dtype=torch.float64)
    (found,) = evaluate(graph, [node])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    mixes = {"turn out", "dense out"} & {*names}
    assert rows_apart(graph, node) == (not mixes)


def test_blocks_have_few_rows_and_come_in_order() -> None:
    graph, node = weight_graph(STEPS["gain"], STEPS["turn in"])
    places = [place.rows for place, _ in blocks(graph, [node])]
    assert places == [slice(0, 4), slice(4, 8), slice(8, 12)]


def test_some_rows_alone() -> None:
    graph, node = weight_graph(STEPS["gain"], STEPS["rows"], STEPS["turn in"])
    rows = torch.tensor([7, 2])
    ((place, (part,)),) = blocks(graph, [node], torch.float64, only=rows)
    assert place.rows is rows
    torch.testing.assert_close(part, evaluate(graph, [node])[0][rows])


@pytest.mark.parametrize("name", SOME)
def test_graphs_run_and_fold_as_without_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = apply_passes(captured(name, torch.float32), [*RECIPE, {"quantize-weights": {"group_size": 8}}])
    tokens, folded = tokens_for(graph), apply_passes(graph, ["fold-constants"])
    found = run(graph, tokens), exactly(graph, tokens), run(folded, tokens)
    monkeypatch.undo()
    again = apply_passes(graph, ["fold-constants"])
    expected = run(graph, tokens), exactly(graph, tokens), run(again, tokens)
    for one, other, allowed in zip(found, expected, (1e-5, 1e-12, 1e-5), strict=True):
        assert relative_error(one, other) <= allowed
    theirs = parameters(again)
    assert all(torch.equal(value, theirs[key]) for key, value in parameters(folded).items())


@pytest.mark.parametrize("name", SOME)
def test_products_of_what_passes_wrote(name: str) -> None:
    """Without computing a rotated weight, the logits in float64 are the same."""
    graph = apply_passes(captured(name), RECIPE)
    tokens, known = tokens_for(graph), Products()
    *_, (_, found) = values(graph, tokens, torch.float64, linear=known.linear)
    assert relative_error(found, exactly(graph, tokens)) <= 1e-12
    *_, (_, again) = values(captured(name), tokens, torch.float64, linear=known.linear)
    assert relative_error(found, again) <= 1e-10


def test_a_product_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, after = captured("llama"), apply_passes(captured("llama"), RECIPE, verify=False)
    tokens, known, read = tokens_for(graph), Products(), list[Tensor]()
    monkeypatch.setattr(products, "rest", lambda weight, part=None: read.append(weight))
    list(values(graph, tokens, torch.float64, linear=known.linear))
    linears = sum(is_op(node, "linear") for node in graph.graph.nodes)
    assert len({id(weight) for weight in read}) == linears
    read.clear()
    list(values(after, tokens, torch.float64, linear=known.linear))
    assert not read  # what goes into every weight is what went into it before
    assert 0 < known.off < 1e-12


@pytest.mark.parametrize("part", ["up_proj", "o_proj", "lm_head"])
def test_a_changed_weight_is_noticed(part: str) -> None:
    """A factor that is off by a millionth, in an expression or in the weight itself."""
    graph = captured("llama")
    for expression in (True, False):
        wrong = copy_graph(graph)
        node = next(n for n in wrong.graph.nodes if n.op == "get_attr" and part in str(n.target))
        if expression:
            with wrong.graph.inserting_after(node):
                scaled = wrong.graph.call_function(
                    ours.rotate.default, (node, _nearly_one(wrong, node, 1e-6), 1)
                )
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user, new=scaled: user is not new)
        else:
            owner, _, leaf = str(node.target).rpartition(".")
            value = get_tensor(graph, str(node.target)) * (1 + 1e-6)
            setattr(wrong.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
        wrong.recompile()
        with pytest.raises(VerificationError, match="logits differ by"):
            verify_same(graph, wrong, "wrong", set())


def _nearly_one(graph: fx.GraphModule, weight: fx.Node, off: float) -> fx.Node:
    width = get_tensor(graph, str(weight.target)).shape[1]
    value = torch.eye(width, dtype=torch.float64) * (1 + off)
    graph.register_parameter("nearly", torch.nn.Parameter(value, requires_grad=False))
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(first):
        return graph.graph.get_attr("nearly")


def test_a_map_that_says_something_else_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every weight are computed as they are written, too."""
    known = Products()
    graph = apply_passes(captured("llama"), ["fuse-norm"], verify=False)
    monkeypatch.setattr(
        products.Products, "_mapped", lambda self, g, node, way, maps, x: x.new_zeros(*x.shape[:-1], 97)
    )
    tokens = tokens_for(graph)
    head = next(n for n in reversed(graph.graph.nodes) if is_op(n, "linear"))
    given = dict(values(graph, tokens, torch.float64))
    assert known.linear(graph, head, given[head.args[0]]) is None
