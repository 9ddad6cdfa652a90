"""Canonical linears: `addmm` becomes `linear`, and a linear that is cut apart becomes one linear a part."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from rolora_passes.graphs.graph import argument, aten, constants, insert, is_op
from rolora_passes.graphs.shapes import shape_of


def addmm_to_linear(gm: fx.GraphModule) -> None:
    """view(addmm(b, view(x, [-1, n]), W), [B, S, m]) -> linear(x, t(W), b); mm and matmul alike."""
    known = constants(gm)
    for node in list(gm.graph.nodes):
        if is_op(node, "addmm") and not node.kwargs:
            bias, x, weight = node.args
        elif is_op(node, "mm", "matmul"):
            bias, (x, weight) = None, node.args[:2]
        else:
            continue
        if (
            weight not in known
            or (bias is not None and bias not in known)
            or len(shape_of(weight) or ()) != 2
        ):
            continue
        if is_op(weight, "t") or (is_op(weight, "transpose") and {*weight.args[1:]} <= {0, 1, -1, -2}):
            turned = weight.args[0]
        else:
            turned = insert(gm, node, aten.t.default, weight)
            turned.meta["val"] = weight.meta["val"].t()
        _unflattened(gm, node, x, turned, bias)


def _unflattened(
    gm: fx.GraphModule, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> None:
    """Put the linear on the value before its leading axes were merged, where they are split again after."""
    new = insert(gm, node, aten.linear.default, x, weight, bias)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    if not is_op(x, "view", "reshape", "flatten"):
        return
    whole = x.args[0]
    before = shape_of(whole)
    for user in list(new.users):
        after = shape_of(user)
        if is_op(user, "view", "reshape") and before and after and after[:-1] == before[:-1]:
            direct = insert(gm, user, aten.linear.default, whole, weight, bias)
            direct.meta = dict(user.meta)
            user.replace_all_uses_with(direct)


def parts_to_slices(gm: fx.GraphModule) -> None:
    """getitem(chunk(x, n, dim), i) and getitem(split(x, …), i) -> slice(x, dim, start, end)."""
    for node in list(gm.graph.nodes):
        if not is_op(node, "chunk", "split", "split_with_sizes"):
            continue
        dim, starts = argument(node, "dim"), [0]
        for part in node.meta["val"]:
            starts.append(starts[-1] + part.shape[dim])
        if all(isinstance(s, int) for s in starts):
            for reader in list(node.users):
                start, end = starts[reader.args[1]], starts[reader.args[1] + 1]
                new = insert(gm, reader, aten.slice.Tensor, node.args[0], dim, start, end)
                new.meta = dict(reader.meta)
                reader.replace_all_uses_with(new)


def unbind_to_slices(gm: fx.GraphModule) -> None:
    """getitem(unbind(unflatten(x, -1, [n, …]), -k), i) -> unflatten(slice(x, -1, start, end), -1, […])."""
    for node in list(gm.graph.nodes):
        whole = node.args[0] if is_op(node, "unbind") else None
        if not is_op(whole, "unflatten") or whole.args[1] != -1:
            continue
        x, _, (_, *sizes) = whole.args
        rank, width = len(shape_of(whole)), prod(sizes)
        if argument(node, "dim") % rank != rank - 1 - len(sizes):
            continue
        for reader in list(node.users):
            start = reader.args[1] * width
            new = insert(gm, reader, aten.slice.Tensor, x, -1, start, start + width)
            new.meta["val"] = reader.meta["val"].flatten(-len(sizes))
            new = insert(gm, reader, aten.unflatten.int, new, -1, sizes) if len(sizes) > 1 else new
            new.meta["val"] = reader.meta["val"]
            reader.replace_all_uses_with(new)


def split_linears(gm: fx.GraphModule) -> None:
    """Give every range of a linear's output that is read alone a linear of its own.

    The output may have been split into heads first, with the ranges inside each head.
    """
    known = constants(gm)
    for node in list(gm.graph.nodes):
        path = _to_linear(node)
        if path and path[-1].args[1] in known and all(len(n.users) == 1 for n in path[1:]):
            for user, (start, end) in _ranges(node).items():
                _split(gm, path, user, start, end)


def _to_linear(node: fx.Node) -> list[fx.Node]:
    """[node, …, linear]: the linear itself, or what only splits it into heads and moves them; else []."""
    path = [node]
    if is_op(path[-1], "transpose"):
        path.append(path[-1].args[0])
    if is_op(path[-1], "unflatten"):
        path.append(path[-1].args[0])
    elif len(path) > 1:
        return []
    return path if is_op(path[-1], "linear") else []


def _ranges(node: fx.Node) -> dict[fx.Node, tuple[int, int]]:
    """Readers of a value and the range of its last axis each reads; empty unless every reader reads one."""
    found: dict[fx.Node, tuple[int, int]] = {}
    shape = shape_of(node) or (None,)
    for user in node.users:
        if not is_op(user, "slice") or user.args[1] % len(shape) != len(shape) - 1:
            return {}
        if not isinstance(shape[-1], int) or argument(user, "step") != 1:
            return {}
        span = range(shape[-1])[user.args[2] : user.args[3]]
        found[user] = (span.start, span.stop)
    return found


def _split(gm: fx.GraphModule, path: list[Any], user: fx.Node, start: int, end: int) -> None:
    """Replace a range of path[0] by a linear on those rows, led through the rest of the path."""
    heads = path[-2].args[2] if len(path) > 1 else None
    x, *tensors = path[-1].args
    new = insert(gm, user, aten.linear.default, x, *(_rows(gm, user, t, heads, start, end) for t in tensors))
    value = user.meta["val"]
    if len(path) == 3:
        value = value.transpose(*path[0].args[1:3])
    if heads is not None:
        new.meta["val"] = value.flatten(-2)
        new = insert(gm, user, aten.unflatten.int, new, -1, [heads[0], end - start])
        new.meta["val"] = value
    if len(path) == 3:
        new = insert(gm, user, aten.transpose.int, new, *path[0].args[1:3])
    new.meta = dict(user.meta)
    user.replace_all_uses_with(new)


def _rows(
    gm: fx.GraphModule, before: fx.Node, tensor: object, heads: Any, start: int, end: int
) -> fx.Node | None:
    if not isinstance(tensor, fx.Node):
        return None
    value = tensor.meta["val"]
    if heads is None:
        part = insert(gm, before, aten.slice.Tensor, tensor, 0, start, end)
        part.meta["val"] = value[start:end]
        return part
    by_head = insert(gm, before, aten.unflatten.int, tensor, 0, list(heads))
    part = insert(gm, before, aten.slice.Tensor, by_head, 1, start, end)
    rows = insert(gm, before, aten.flatten.using_ints, part, 0, 1)
    rows.meta["val"] = value.unflatten(0, list(heads))[:, start:end].flatten(0, 1)
    return rows
