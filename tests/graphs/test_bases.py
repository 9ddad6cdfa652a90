"""The classes of real models, and every operator a rule could be fooled by."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import captured
from random_graphs import VOCABULARY
from test_bases_random import check_classes
from torch import Tensor, fx

from rolora_passes import FoldConstants, FuseNorm, apply_passes
from rolora_passes.graphs.bases.inference import BasisClass, Group, infer_bases
from rolora_passes.graphs.graph import finish, set_tensor

aten, rolora = torch.ops.aten, torch.ops.rolora


def fused(name: str) -> fx.GraphModule:
    return apply_passes(captured(name), [FuseNorm(), FoldConstants()])


def of_kind(graph: fx.GraphModule, kind: str) -> list[BasisClass]:
    return [c for c in infer_bases(graph).classes if c.kind == kind]


def test_a_llamas_residual() -> None:
    (residual,) = of_kind(fused("llama"), "residual")
    assert residual.size == 24 and residual.group == Group.ORTHOGONAL and residual.name == "residual"
    parts = (
        "embed_tokens",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "lm_head",
    )
    assert {a.parameter.split(".")[-2] for a in residual.parameters} == set(parts)
    assert len(residual.parameters) == 2 + 7 * 2
    writers = {a.parameter.split(".")[-2] for a in residual.parameters if not a.flipped}
    readers = {a.parameter.split(".")[-2] for a in residual.parameters if a.flipped}
    assert sorted(map(sorted, (writers, readers))) == sorted(
        map(
            sorted,
            ({"embed_tokens", "o_proj", "down_proj"}, {*parts} - {"embed_tokens", "o_proj", "down_proj"}),
        )
    )


def test_a_llamas_heads() -> None:
    heads = of_kind(fused("llama"), "head")
    assert [h.name for h in heads] == ["head.0", "head.1"]
    for number, head in enumerate(heads):
        assert head.size == 8 and head.group == Group.INVERTIBLE
        assert {str(a) for a in head.parameters} == {
            f"model.layers.{number}.self_attn.v_proj.weight axis 0 as 2x8",
            f"model.layers.{number}.self_attn.o_proj.weight axis 1 as 4x8",
        }


def test_a_llamas_inner_axes_are_rigid_with_the_reason() -> None:
    inner = [c for c in of_kind(fused("llama"), "inner") if c.size == 40]
    assert len(inner) == 2
    for cls in inner:
        assert not cls.free and "element by element" in cls.why_rigid()
        assert re.match(r"silu(_1)? acts on every element for itself", cls.why_rigid()), "no name twice"


def test_a_llamas_queries_and_keys_are_held_by_rotary_embedding() -> None:
    for cls in of_kind(fused("llama"), "query-key"):
        assert not cls.free and "rotary_embedding" in cls.why_rigid()


def test_before_fusing_the_residual_is_rigid_and_names_the_gain() -> None:
    (residual,) = of_kind(captured("llama"), "residual")
    assert not residual.free
    assert "model.layers.0.input_layernorm.weight" in residual.why_rigid()


def test_a_tied_table_is_one_class_read_and_written() -> None:
    graph = apply_passes(captured("llama-tied"), [FuseNorm(tied="keep"), FoldConstants()])
    classes = [
        c
        for c in of_kind(graph, "residual")
        if any("lm_head" in a.parameter or "embed" in a.parameter for a in c.parameters)
    ]
    assert all(c.free for c in classes)


def test_gemma2s_post_norm_blocks_the_residual() -> None:
    (residual,) = of_kind(fused("gemma2"), "residual")
    assert not residual.free
    assert "mul" in residual.why_rigid() and "post_attention_layernorm.weight" in residual.why_rigid()


def test_opts_queries_and_keys_are_free() -> None:
    found = of_kind(fused("opt"), "query-key")
    assert len(found) == 2 and all(c.group == Group.INVERTIBLE and c.size == 6 for c in found)


def test_fused_projections_find_the_same_classes() -> None:
    llama, phi3 = (
        [(c.kind, c.size, c.group) for c in infer_bases(fused(n)).rotatable()] for n in ("llama", "phi3")
    )
    assert sorted(llama) == sorted(phi3)


# Operators that look like something a rule knows. Each is put between an embedding [B, S, 4] and a linear
# that reads whatever comes out; the embedding's axis must not be free beyond what the operator admits.


def between(grow: Callable[[fx.Graph, fx.Node, Callable[[Tensor], fx.Node]], fx.Node]) -> fx.GraphModule:
    generator = torch.Generator().manual_seed(0)
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    graph = module.graph
    numbers, _ = graph.placeholder("tokens"), graph.placeholder("positions")
    count = 0

    def tensor(value: Tensor) -> fx.Node:
        nonlocal count
        count += 1
        set_tensor(module, f"p{count}.weight", value)
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            return graph.create_node("get_attr", f"p{count}.weight")

    table = tensor(torch.randn(VOCABULARY, 4, generator=generator, dtype=torch.float64))
    x = graph.call_function(aten.embedding.default, (table, numbers))
    y = grow(graph, x, tensor)
    head = tensor(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    graph.output(graph.call_function(aten.linear.default, (y, head)))
    return finish(module)


def call(target: Any, *args: Any, **kwargs: Any) -> Callable[[fx.Graph, fx.Node, Any], fx.Node]:
    """target(x, *args), tensors among the arguments as parameters."""

    def grow(graph: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
        given = [tensor(a) if isinstance(a, Tensor) else a for a in args]
        return graph.call_function(target, (x, *given), kwargs)

    return grow


def _flags(graph: fx.Graph, x: fx.Node, tensor: Callable[[Tensor], fx.Node]) -> fx.Node:
    row = graph.call_function(aten.select.int, (x, 1, 0))
    mask = graph.call_function(aten.gt.Scalar, (row, 0.0))
    numbers = graph.call_function(aten.where.Scalar, (mask, 1.5, 0.25))
    return graph.call_function(aten.to.dtype, (numbers, torch.float64))


square = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
vector = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
TRAPS: dict[str, Callable[[fx.Graph, fx.Node, Any], fx.Node]] = {
    "division that rounds": call(aten.div.Tensor_mode, 0.37, rounding_mode="floor"),
    "a cast to integers and back": lambda g, x, t: g.call_function(
        aten.to.dtype, (g.call_function(aten.to.dtype, (x, torch.int64)), torch.float64)
    ),
    "a clamp by a vector": call(aten.clamp.Tensor, vector),
    "a power of a scalar": lambda g, x, t: g.call_function(aten.pow.Scalar, (1.5, x)),
    "integers added": call(aten.add.Tensor, torch.tensor([1, 2, 0, 5])),
    "numbers chosen by a mask": _flags,
    "a bias of one number": lambda g, x, t: g.call_function(
        aten.linear.default, (x, t(square), t(torch.ones(1, dtype=torch.float64)))
    ),
    "a bias that is a keyword": lambda g, x, t: g.call_function(
        aten.linear.default, (x, t(square)), {"bias": t(vector)}
    ),
    "transposition by keyword": lambda g, x, t: g.call_function(
        aten.transpose.int, (g.call_function(aten.matmul.default, (
            g.call_function(aten.transpose.int, (x,), {"dim0": 1, "dim1": 2}), x)),), {"dim0": 1, "dim1": 2}
    ),
    "another namespace's neg": call(torch.ops.fuzz.neg.default),
    "another namespace's mul": call(torch.ops.fuzz.mul.default),
    "bits read anew": lambda g, x, t: g.call_function(
        aten.view.dtype, (g.call_function(aten.view.dtype, (x, torch.int64)), torch.float64)
    ),
    "a mean over everything": lambda g, x, t: g.call_function(
        aten.add.Tensor, (x, g.call_function(aten.mean.dim, (x, [], True)))
    ),
    "a gain inside the norm": call(aten.rms_norm.default, [4], vector, 1e-6),
    "a vector added": call(aten.add.Tensor, vector),
    "a vector multiplied": call(aten.mul.Tensor, vector),
    "a number added": call(aten.add.Tensor, 0.5),
    "a number multiplied": call(aten.mul.Tensor, 0.5),
    "itself transposed": lambda g, x, t: g.call_function(
        aten.matmul.default,
        (g.call_function(aten.matmul.default, (x, g.call_function(aten.transpose.int, (x, 1, 2)))), x),
    ),
    "a table written and read": lambda g, x, t: (lambda w: g.call_function(
        aten.linear.default,
        (g.call_function(aten.linear.default, (x, w)), g.call_function(aten.t.default, (w,))),
    ))(t(square)),
    "a turn of half the axis": lambda g, x, t: g.call_function(aten.cat.default, ([
        g.call_function(aten.slice.Tensor, (x, 2, 2, 4)), g.call_function(aten.slice.Tensor, (x, 2, 0, 2))
    ], -1)),
    "softmax": call(aten.softmax.int, -1),
    "cumsum": call(aten.cumsum.default, -1),
    "sort of a batch": lambda g, x, t: g.call_function(aten.flip.default, (x, [0, 2])),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_no_operator_fools_a_rule(trap: str) -> None:
    check_classes(between(TRAPS[trap]))


@pytest.mark.parametrize(
    ("trap", "group"),
    [
        ("a number multiplied", Group.INVERTIBLE),
        ("a vector added", Group.INVERTIBLE),  # the vector turns with it
        ("a number added", Group.PERMUTATION),
        ("a vector multiplied", Group.PERMUTATION),
        ("itself transposed", Group.ORTHOGONAL),
        ("softmax", Group.PERMUTATION),
        ("cumsum", Group.NONE),
        ("another namespace's neg", Group.NONE),
        ("a turn of half the axis", Group.NONE),
    ],
)
def test_groups(trap: str, group: Group) -> None:
    table = next(c for c in infer_bases(between(TRAPS[trap])).classes if "embedding" in c.roles)
    assert table.group == group, table.why_rigid()
    assert bool(table.why_rigid()) == (group < Group.INVERTIBLE)
