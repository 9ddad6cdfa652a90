"""Rotary embeddings in plain operators, arranged so that a token pays for as little as possible."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rolora_passes.graphs.graph import argument, set_tensor

_aten = torch.ops.aten


def expand_rotary(graph: fx.GraphModule, widths: dict[fx.Node, int]) -> None:
    """Write each rotary embedding as products with tables, in place.

    Before:  rotary_embedding(x, cos, sin)
    After:   x * unsqueeze(cos, -2) + cat(x[R/2:], x[:R/2]) * unsqueeze(sin * signs, -2)

    What is done to cos and sin is shared by all that use them and depends on positions alone, so
    AddKVCache keeps it in its tables. Interleaved pairs are exchanged by a permutation matrix.

    Args:
        widths: the last size of every value the embeddings read.
    """
    tables: dict[tuple[fx.Node, fx.Node, bool], tuple[fx.Node, fx.Node]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.rolora.rotary_embedding.default):
        x, cos, sin, interleaved = (argument(node, n) for n in ("x", "cos", "sin", "interleaved"))
        width, whole = widths[cos], widths[x]
        with graph.graph.inserting_before(node):
            if (cos, sin, interleaved) not in tables:
                tables[cos, sin, interleaved] = _tables(graph, cos, sin, width, interleaved)
            call = graph.graph.call_function
            turned = x if width == whole else call(_aten.slice.Tensor, (x, -1, 0, width))
            out = _turn(graph, turned, tables[cos, sin, interleaved], width, interleaved)
            if width != whole:
                rest = call(_aten.slice.Tensor, (x, -1, width, whole))
                out = call(_aten.cat.default, ([out, rest], -1))
        node.replace_all_uses_with(out)
        graph.graph.erase_node(node)
    graph.recompile()


def _tables(
    graph: fx.GraphModule, cos: fx.Node, sin: fx.Node, width: int, interleaved: bool
) -> tuple[fx.Node, fx.Node]:
    """cos and signed sin as [B or 1, S, 1, R], computed where both are first known."""
    call = graph.graph.call_function
    first = _first_channels(width, interleaved)
    set_tensor(graph, f"rotary.signs_{width}_{interleaved}", torch.where(first, -1.0, 1.0))
    with graph.graph.inserting_after(max(cos, sin)):
        signs = graph.graph.get_attr(f"rotary.signs_{width}_{interleaved}")
    with graph.graph.inserting_after(signs):
        wide = call(_aten.unsqueeze.default, (cos, -2))
    with graph.graph.inserting_after(wide):
        signed = call(_aten.mul.Tensor, (sin, signs))
    with graph.graph.inserting_after(signed):
        return wide, call(_aten.unsqueeze.default, (signed, -2))


def _first_channels(width: int, interleaved: bool) -> Tensor:
    """Which channels are the first of their pair."""
    index = torch.arange(width)
    return index % 2 == 0 if interleaved else index < width // 2


def _turn(
    graph: fx.GraphModule, x: fx.Node, tables: tuple[fx.Node, fx.Node], width: int, interleaved: bool
) -> fx.Node:
    call, half = graph.graph.call_function, width // 2
    if interleaved:
        name = f"rotary.exchange_{width}"
        set_tensor(graph, name, torch.eye(width)[torch.arange(width) ^ 1])
        partner = call(_aten.linear.default, (x, graph.graph.get_attr(name)))
    else:
        halves = (call(_aten.slice.Tensor, (x, -1, a, a + half)) for a in (half, 0))
        partner = call(_aten.cat.default, (list(halves), -1))
    straight, crossed = (call(_aten.mul.Tensor, pair) for pair in zip((x, partner), tables, strict=True))
    return call(_aten.add.Tensor, (straight, crossed))
