"""What mixes positions other than by attention is named; what works position by position is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, chosen
from helpers import captured
from tiny_llama import aten, rolora, tiny_llama
from torch import Tensor, fx

from rolora_passes import apply_passes
from rolora_passes.decoding.state import mixing
from rolora_passes.errors import LoweringError
from rolora_passes.export import AddKVCache, to_executorch, to_onnx
from rolora_passes.export.onnx.lower import Flavor
from rolora_passes.graphs.graph import insert, insert_after, is_op
from rolora_passes.graphs.operators import Operator, operators
from rolora_passes.graphs.operators.places import pointwise

Rewrite = Callable[[fx.GraphModule, fx.Node], fx.Node]


def chain(*calls: tuple[object, ...]) -> Rewrite:
    """Operators one after another on a value; `...` stands for the value, "S" for the number of tokens."""

    def rewrite(graph: fx.GraphModule, x: fx.Node) -> fx.Node:
        tokens = graph.graph.find_nodes(op="placeholder")[0]
        size, value = insert_after(graph, x, aten.sym_size.int, tokens, 1), x
        after = size
        for target, *arguments in calls:
            known = {"...": value, "S": size}
            given = fx.node.map_aggregate(
                tuple(arguments), lambda a, k=known: k.get(a, a) if isinstance(a, str) else a
            )
            after = value = insert_after(graph, after, target, *given)  # type: ignore[arg-type]
        return value

    return rewrite


def _by_hand(graph: fx.GraphModule, x: fx.Node) -> fx.Node:
    turned = insert_after(graph, x, aten.transpose.int, x, 1, 2)
    scores = insert_after(graph, turned, aten.matmul.default, x, turned)
    return insert_after(graph, scores, aten.matmul.default, scores, x)


MIXES: dict[str, Rewrite] = {
    "cumsum": chain((aten.cumsum.default, "...", 1)),
    "mean": chain((aten.mean.dim, "...", [1], True)),
    "amax": chain((aten.amax.default, "...", [1], True)),
    "all": chain((aten.sum.default, "...")),
    "softmax": chain((aten.softmax.int, "...", 1)),
    "flip": chain((aten.flip.default, "...", [1])),
    "roll": chain((aten.roll.default, "...", [1], [1])),
    "pad and slice": chain(
        (aten.constant_pad_nd.default, "...", [0, 0, 1, 0]), (aten.slice.Tensor, "...", 1, 0, -1)
    ),
    "attention by hand": lambda graph, x: _by_hand(graph, x),
    "transposed": chain(
        (aten.transpose.int, "...", 1, 2), (aten.cumsum.default, "...", 2), (aten.transpose.int, "...", 1, 2)
    ),
    "flattened": chain(
        (aten.flatten.using_ints, "...", 0, 1), (aten.cumsum.default, "...", 0),
        (aten.view.default, "...", [-1, "S", 64]),
    ),
    "count": chain((aten.mul.Tensor, "...", "S")),
    "unknown": chain((aten.cummax.default, "...", 1)),
}  # fmt: skip
BY_POSITION = {
    "flattened": chain(
        (aten.view.default, "...", [-1, 64]), (aten.cumsum.default, "...", 1),
        (aten.view.default, "...", [-1, "S", 64]),
    ),
    "transposed": chain(
        (aten.transpose.int, "...", 1, 2), (aten.softmax.int, "...", 1), (aten.transpose.int, "...", 1, 2)
    ),
    "features": chain((aten.roll.default, "...", [3], [2]), (aten.flip.default, "...", [-1])),
    "split": chain(
        (aten.unflatten.int, "...", -1, [4, 16]), (aten.cumsum.default, "...", 2),
        (rolora.hadamard.default, "...", 16), (aten.flatten.using_ints, "...", 2, 3),
    ),
}  # fmt: skip


def with_rewrite(rewrite: Rewrite) -> fx.GraphModule:
    graph = tiny_llama(layers=1)
    node = next(n for n in graph.graph.nodes if is_op(n, "embedding"))
    readers = list(node.users)
    new = rewrite(graph, node)
    for reader in readers:
        reader.replace_input_with(node, new)
    graph.recompile()
    return graph


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_positions_is_named(name: str) -> None:
    graph = with_rewrite(MIXES[name])
    (first, *_), added = (
        mixing(graph),
        {n.name for n in graph.graph.nodes} - {n.name for n in tiny_llama(layers=1).graph.nodes},
    )
    assert first.name in added


def test_a_table_that_is_gathered_by_position() -> None:
    """What BERT's decoders do with the types of tokens."""
    graph = tiny_llama(layers=1)
    positions = graph.graph.find_nodes(op="placeholder")[1]
    graph.register_buffer("kinds", torch.zeros(1, 64))
    node = next(n for n in graph.graph.nodes if is_op(n, "embedding"))
    with graph.graph.inserting_before(node):
        table = graph.graph.get_attr("kinds")
        size = graph.graph.call_function(aten.sym_size.int, (positions, 0))
    wide = insert_after(graph, size, aten.expand.default, table, [size, -1])
    picked = insert_after(graph, wide, aten.gather.default, wide, 1, positions)
    kind = insert_after(graph, picked, aten.unsqueeze.default, picked, -1)
    readers = list(node.users)
    for moved in (kind, picked, wide, size, table):
        node.append(moved)
    new = insert_after(graph, kind, aten.add.Tensor, node, kind)
    for reader in readers:
        reader.replace_input_with(node, new)
    graph.recompile()
    assert not mixing(graph)


@pytest.mark.parametrize("name", BY_POSITION)
def test_what_works_by_position_is_not(name: str) -> None:
    assert not mixing(with_rewrite(BY_POSITION[name]))


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_decoders_that_need_no_other_state(name: str) -> None:
    assert not mixing(captured(name, torch.float32))


@torch.library.custom_op("strange::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_that_is_one_piece_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its positions are known, so a cache may be made; but no runtime has it."""
    monkeypatch.setitem(operators(), "strange::double", Operator("strange::double", positions=pointwise))
    graph = tiny_llama(layers=1)
    node = next(n for n in graph.graph.nodes if is_op(n, "silu"))
    new = insert_after(graph, node, torch.ops.strange.double.default, node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    new.meta["source"] = "model.py:12: x = double(x)"
    named = r"1 nodes have operators .*\n  strange.double.default: `double_default`, model.py:12: x = double"
    with pytest.raises(LoweringError, match=named):
        to_executorch(graph, tmp_path / "model.pte", max_length=16)
    flavors: tuple[Flavor, ...] = ("ort", "portable")
    for flavor in flavors:
        with pytest.raises(LoweringError, match=named):
            to_onnx(graph, tmp_path / "model", flavor, max_length=16)
    assert not list(tmp_path.iterdir())


def test_a_convolution_is_refused_by_every_lowering(tmp_path: Path) -> None:
    graph = tiny_llama(layers=1)
    node = next(n for n in graph.graph.nodes if is_op(n, "silu"))
    graph.register_buffer("kernel", torch.ones(96, 1, 3))
    with graph.graph.inserting_before(node):
        kernel = graph.graph.get_attr("kernel")
    turned = insert(graph, node, aten.transpose.int, node.args[0], 1, 2)
    mixed = insert(graph, node, aten.conv1d.default, turned, kernel, None, [1], [1], [1], 96)
    mixed.meta["source"] = "model.py:7: x = conv(x)"
    node.update_arg(0, insert(graph, node, aten.transpose.int, mixed, 1, 2))
    graph.recompile()
    lowerings: list[Callable[[], object]] = [
        lambda: to_executorch(graph, tmp_path / "model.pte"),
        lambda: to_onnx(graph, tmp_path / "ort"),
        lambda: to_onnx(graph, tmp_path / "portable", "portable"),
        lambda: apply_passes(graph, [AddKVCache()]),
    ]
    for lower in lowerings:
        with pytest.raises(
            LoweringError, match=r"conv1d.*model.py:7.*a convolution along the sequence.* state"
        ):
            lower()
    assert not list(tmp_path.iterdir())
