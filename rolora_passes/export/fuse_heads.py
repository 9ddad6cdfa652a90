"""One projection for the query, key and value heads that read one value.

A decode step pays for every operator it starts and for every activation it quantizes; rows of a linear
are independent, and so are their scales, so the result is the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.buffers import drop_unused
from rolora_passes.graphs.graph import argument, get_tensor, is_op, set_tensor
from rolora_passes.ondisk import kept, rest

_aten = torch.ops.aten


def fuse_heads(graph: fx.GraphModule) -> None:
    """Join projections that read one value and are split into heads of one width, in place.

    Before:  rotary(unflatten(linear(x, Wq), [9, 64])), rotary(unflatten(linear(x, Wk), [3, 64])), ..
    After:   h = unflatten(linear(x, [Wq; Wk; Wv]), [15, 64]); r = rotary(h[:, :, :12]);
             r[:, :, :9], r[:, :, 9:], h[:, :, 12:]
    """
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=_aten.linear.default):
        key = _key(node)
        if key is not None:
            groups.setdefault(key, []).append(node)
    for members in groups.values():
        if len(members) > 1:
            _share(graph.graph, _join(graph, members))
    drop_unused(graph.graph)
    graph.recompile()


def _key(node: fx.Node) -> Any:
    """Equal for linears that can be joined; None for one that cannot."""
    users = list(node.users)
    if len(users) != 1 or not is_op(users[0], "unflatten") or users[0].args[1] not in (-1, 2):
        return None
    sizes = users[0].args[2]
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or not isinstance(sizes, list | tuple) or len(sizes) != 2:
        return None
    if weight.op == "get_attr":
        form: Any = None
    elif is_op(weight, "dequantize") and all(a.op == "get_attr" for a in weight.all_input_nodes):
        form = (weight.target, weight.args[2] is None, weight.args[3:])
    else:
        return None
    return (_source(node), sizes[1], form, argument(node, "bias") is None)


def _source(node: fx.Node) -> tuple[fx.Node, bool]:
    """The value a linear reads, and whether it reads it quantized."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if is_op(x, "fake_quantize"):
        return x.args[0], True
    return x, False


def _join(graph: fx.GraphModule, members: list[fx.Node]) -> list[fx.Node]:
    """One linear for all; returns what replaces each member's heads, rotated ones first."""
    members.sort(key=lambda n: not any(is_op(u, "rotary_embedding") for u in _heads(n).users))
    counts = [int(_heads(n).args[2][0]) for n in members]  # type: ignore[index, arg-type]
    width = _heads(members[0]).args[2][1]  # type: ignore[index]
    first = min(members)
    with graph.graph.inserting_before(first):
        bias = None
        if argument(first, "bias") is not None:
            bias = _stack(graph, [argument(n, "bias") for n in members])
        fused = graph.graph.call_function(
            _aten.linear.default, (first.args[0], _weight(graph, members), bias)
        )
        heads = graph.graph.call_function(_aten.unflatten.int, (fused, -1, [sum(counts), width]))
        parts = []
        for index, (node, count) in enumerate(zip(members, counts, strict=True)):
            start = sum(counts[:index])
            part = graph.graph.call_function(_aten.slice.Tensor, (heads, 2, start, start + count))
            _heads(node).replace_all_uses_with(part)
            parts.append(part)
    for node in members:
        graph.graph.erase_node(_heads(node))
        graph.graph.erase_node(node)
    return parts


def _heads(linear: fx.Node) -> fx.Node:
    return next(iter(linear.users))


def _weight(graph: fx.GraphModule, members: list[fx.Node]) -> fx.Node:
    weights = [n.args[1] for n in members]
    first = weights[0]
    assert isinstance(first, fx.Node)
    if first.op == "get_attr":
        return _stack(graph, weights)
    stacked = [
        None if first.args[i] is None else _stack(graph, [w.args[i] for w in weights])  # type: ignore[union-attr]
        for i in range(3)
    ]
    return graph.graph.call_function(first.target, (*stacked, *first.args[3:]), first.kwargs)  # type: ignore[arg-type]


def _stack(graph: fx.GraphModule, nodes: list[Any]) -> fx.Node:
    """The tensors of these parameters, one below the other, as a new parameter."""
    parts = zip(*(str(n.target).split(".") for n in nodes), strict=False)
    name = ".".join(["fused", *("_".join(dict.fromkeys(same)) for same in parts)])
    tensors = [get_tensor(graph, n.target) for n in nodes]
    set_tensor(graph, name, kept(torch.cat([tensor.detach() for tensor in tensors])))
    for tensor in tensors:
        rest(tensor)
    return graph.graph.get_attr(name)


def _share(graph: fx.Graph, parts: list[fx.Node]) -> None:
    """Let neighbouring parts go through equal headwise operators together, as far as they do."""
    for i in range(len(parts) - 1):
        while (pair := _equal_users(parts[i], parts[i + 1])) is not None:
            parts[i : i + 2] = _merge(graph, parts[i], parts[i + 1], *pair)


def _bounds(part: fx.Node) -> tuple[int, int]:
    """First head and the one after the last of slice(h, 2, first, end)."""
    return int(argument(part, "start")), int(argument(part, "end"))


def _equal_users(left: fx.Node, right: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The only users of two parts, if they do the same to each head."""
    if left.args[0] is not right.args[0] or _bounds(left)[1] != _bounds(right)[0]:
        return None
    if len(left.users) != 1 or len(right.users) != 1:
        return None
    first, second = next(iter(left.users)), next(iter(right.users))
    headwise = is_op(first, "rotary_embedding") or (
        is_op(first, "hadamard", "kronecker") and argument(first, "dim") in (-1, 3)
    )
    same = (
        first.target is second.target and first.args[1:] == second.args[1:] and first.kwargs == second.kwargs
    )
    return (first, second) if headwise and same else None


def _merge(
    graph: fx.Graph, left: fx.Node, right: fx.Node, first: fx.Node, second: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Replace op(h[a:b]), op(h[b:c]) by o = op(h[a:c]), o[:b-a], o[b-a:]; returns the last two."""
    heads, start, middle, end = (argument(left, "self"), *_bounds(left), _bounds(right)[1])
    with graph.inserting_before(min(first, second)):
        both = graph.call_function(_aten.slice.Tensor, (heads, 2, start, end))
        result = graph.call_function(first.target, (both, *first.args[1:]), first.kwargs)  # type: ignore[arg-type]
        cut, size = middle - start, end - start
        parts = (
            graph.call_function(_aten.slice.Tensor, (result, 2, 0, cut)),
            graph.call_function(_aten.slice.Tensor, (result, 2, cut, size)),
        )
    for old, new in zip((first, second), parts, strict=True):
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    graph.erase_node(left)
    graph.erase_node(right)
    return parts
