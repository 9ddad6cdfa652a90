"""Canonical rotary position embedding: x·cos + partner(x)·sin becomes one node, heads before head_dim.

The partner of x is (-x[h:], x[:h]) where channels pair across halves, and (-x1, x0, -x3, x2, …) where
neighbours pair. Channels that are split off before and concatenated after stay outside the node's
turned width (partial rotary embedding).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.capture.casts import bare, cast_to
from rolora_passes.graphs.graph import aten, insert, is_op
from rolora_passes.graphs.shapes import shape_of


def one_node(gm: fx.GraphModule) -> None:
    """Replace every rotary embedding spelled in elementwise operators; casts are looked through."""
    for node in list(gm.graph.nodes):
        if is_op(node, "add"):
            _match(gm, node)


def whole_heads(gm: fx.GraphModule) -> None:
    """Take channels that were split off, and concatenated again after, into the node that turns the rest."""
    for node in list(gm.graph.nodes):
        if is_op(node, "cat"):
            _absorb_rest(gm, node)


def _match(gm: fx.GraphModule, node: fx.Node) -> None:
    for plain, crossed in (map(bare, node.args[:2]), map(bare, node.args[1::-1])):
        if not (is_op(plain, "mul") and is_op(crossed, "mul")):
            continue
        found = [
            (x, cos, sin, interleaved)
            for x, cos in _orders(plain)
            for partner, sin in _orders(crossed)
            for interleaved in (_pairing(bare(partner), bare(x)),)
            if interleaved is not None
        ]
        if found:
            x, cos, sin, interleaved = found[0]
            _replace(gm, node, x, cos, sin, interleaved)
            return


def _orders(product: Any) -> list[tuple[fx.Node, fx.Node]]:
    a, b = product.args[:2]
    return [(a, b), (b, a)] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _pairing(partner: fx.Node, x: fx.Node) -> bool | None:
    """Is `partner` x's quarter turn? False: halves pair; True: neighbours pair; None: it is not."""
    shape = shape_of(x)
    if not shape or not isinstance(shape[-1], int):
        return None
    half = shape[-1] // 2
    if is_op(partner, "cat") and len(partner.args[0]) == 2:
        low, high = map(bare, partner.args[0])
        if (
            is_op(low, "neg")
            and _range(low.args[0], x) == (half, 2 * half, 1)
            and _range(high, x) == (0, half, 1)
        ):
            return False
    if is_op(partner, "flatten", "view", "reshape") and is_op(partner.args[0], "stack"):
        low, high = map(bare, partner.args[0].args[0])
        if (
            is_op(low, "neg")
            and _range(low.args[0], x) == (1, 2 * half, 2)
            and _range(high, x) == (0, 2 * half, 2)
        ):
            return True
    return None


def _range(node: Any, x: fx.Node) -> tuple[int, int, int] | None:
    """(start, end, step) if `node` is a range of x's last axis."""
    node = bare(node)
    width = shape_of(x)[-1]
    assert isinstance(width, int)
    if not is_op(node, "slice") or bare(node.args[0]) is not x:
        return None
    _, dim, start, end, step = (*node.args, *(0, 0, None, 1)[len(node.args) - 1 :])[:5]
    if dim % len(shape_of(x)) != len(shape_of(x)) - 1:
        return None
    span = range(width)[slice(start, end, step)]
    return (span.start, span.stop if step == 1 else width, step)


def _tables(cos: fx.Node, sin: fx.Node) -> tuple[fx.Node, fx.Node, int] | None:
    """The [B, S, R] tables under `unsqueeze(table, axis)`, and that axis."""
    cos, sin = bare(cos), bare(sin)
    if is_op(cos, "unsqueeze") and is_op(sin, "unsqueeze"):
        axis = cos.args[1] % 4
        if axis in (1, 2) and sin.args[1] % 4 == axis and len(shape_of(cos.args[0]) or ()) == 3:
            return cos.args[0], sin.args[0], axis
    return None


def _replace(
    gm: fx.GraphModule, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool
) -> None:
    tables = _tables(cos, sin)
    if tables is None or len(shape_of(x) or ()) != 4 or shape_of(tables[0])[-1] != shape_of(x)[-1]:
        return
    cos, sin, axis = tables
    value = node.meta["val"]
    x = cast_to(gm, node, x, value.dtype)  # x of half precision, tables in float32
    heads_last = x if axis == 2 else insert(gm, node, aten.transpose.int, x, 1, 2)
    turned = insert(gm, node, torch.ops.rolora.rotary_embedding.default, heads_last, cos, sin, interleaved)
    result = turned if axis == 2 else insert(gm, node, aten.transpose.int, turned, 1, 2)
    for new, like in ((heads_last, x.meta["val"]), (turned, value)):
        if new is not x:
            new.meta["val"] = like if axis == 2 else like.transpose(1, 2)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)


def _absorb_rest(gm: fx.GraphModule, node: Any) -> None:
    """cat(rotary(x[..., :r]), x[..., r:]) -> rotary(x), whose tables are narrower than x."""
    if len(node.args[0]) != 2:
        return
    turned, rest = node.args[0]
    outer = is_op(turned, "transpose")
    rotary = turned.args[0] if outer else turned
    if not is_op(rotary, "rotary_embedding") or not is_op(rest, "slice"):
        return
    inside = rotary.args[0].args[0] if outer else rotary.args[0]
    x = rest.args[0]
    width = shape_of(rotary)[-1]
    if _range(inside, x) != (0, width, 1) or _range(rest, x) != (width, shape_of(x)[-1], 1):
        return
    source = insert(gm, node, aten.transpose.int, x, 1, 2) if outer else x
    whole = insert(gm, node, rotary.target, source, *rotary.args[1:])
    result = insert(gm, node, aten.transpose.int, whole, 1, 2) if outer else whole
    value = node.meta["val"]
    for new in (source, whole):
        if new is not x:
            new.meta["val"] = value.transpose(1, 2) if outer else value
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
