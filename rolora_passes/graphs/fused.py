"""Canonical linears: `addmm` becomes `linear`, and a linear that is cut apart becomes one linear a part."""

from __future__ import annotations

from torch import fx

from rolora_passes.graphs.graph import aten, constants, insert, is_op
from rolora_passes.graphs.shapes import shape_of


def addmm_to_linear(gm: fx.GraphModule) -> None:
    """view(addmm(b, view(x, [-1, n]), W), [B, S, m]) -> linear(x, t(W), b); also mm and matmul by a parameter."""
    known = constants(gm)
    for node in list(gm.graph.nodes):
        if is_op(node, "addmm") and not node.kwargs:
            bias, x, weight = node.args
        elif is_op(node, "mm", "matmul"):
            bias, (x, weight) = None, node.args[:2]
        else:
            continue
        if weight not in known or (bias is not None and bias not in known) or len(shape_of(weight) or ()) != 2:
            continue
        if is_op(weight, "t") or (is_op(weight, "transpose") and {*weight.args[1:]} <= {0, 1, -1, -2}):
            turned = weight.args[0]
        else:
            turned = insert(gm, node, aten.t.default, weight)
            turned.meta["val"] = weight.meta["val"].t()
        _unflattened(gm, node, x, turned, bias)


def _unflattened(gm: fx.GraphModule, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
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


def split_linears(gm: fx.GraphModule) -> None:
    """Give every range of a linear's output that is read alone a linear of its own."""
    for node in list(gm.graph.nodes):
        if is_op(node, "linear") and node.args[1] in constants(gm):
            ranges = _ranges(node)
            for user, (start, end) in ranges.items():
                _split(gm, node, user, start, end)


def _ranges(node: fx.Node) -> dict[fx.Node, tuple[int, int]]:
    """Readers of a linear's output and the range each reads; empty unless every reader reads a range."""
    found: dict[fx.Node, tuple[int, int]] = {}
    rank, width = len(shape_of(node) or ()), (shape_of(node) or (None,))[-1]
    if not isinstance(width, int):
        return {}
    for user in node.users:
        if is_op(user, "slice") and len(user.args) == 4 and user.args[1] % rank == rank - 1:  # type: ignore[operator]
            span = range(width)[user.args[2] : user.args[3]]  # type: ignore[misc]
            found[user] = (span.start, span.stop)
        elif is_op(user, "chunk", "split", "split_with_sizes") and _dim(user) % rank == rank - 1:
            start = 0
            for part, item in enumerate(user.meta["val"]):
                for reader in user.users:
                    if reader.args[1] == part:
                        found[reader] = (start, start + int(item.shape[-1]))
                start += int(item.shape[-1])
        else:
            return {}
    return found


def _dim(node: fx.Node) -> int:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    assert isinstance(dim, int)
    return dim


def _split(gm: fx.GraphModule, node: fx.Node, user: fx.Node, start: int, end: int) -> None:
    x, weight, bias = (*node.args, None)[:3]
    parts = []
    for value in (weight, bias):
        part = insert(gm, user, aten.slice.Tensor, value, 0, start, end) if value is not None else None
        if isinstance(part, fx.Node):
            part.meta["val"] = value.meta["val"][start:end]  # type: ignore[union-attr]
        parts.append(part)
    new = insert(gm, user, aten.linear.default, x, *parts)
    new.meta = dict(user.meta)
    user.replace_all_uses_with(new)
