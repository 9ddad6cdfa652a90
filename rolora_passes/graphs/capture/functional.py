"""Writes in place become values: `div_(x, y)` is `div(x, y)`, read by everything after it that read x.

That is the same only if nothing else looks at the memory that was written: no view of x that was taken
before, and nothing that x is a view of. Such writes are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rolora_passes.errors import CaptureError
from rolora_passes.graphs.graph import aten, insert, is_op, op_name
from rolora_passes.graphs.shapes import same_shape


def make_functional(gm: fx.GraphModule) -> None:
    """Replace every operator that writes into its first operand.

    Raises:
        CaptureError: the memory is an input's or a parameter's, or is read by another name afterwards; or the
            operator has no form that writes nothing.
    """
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # each value's, by the value that it was made for
    for node in list(gm.graph.nodes):
        if not _writes(node):
            memory[node] = memory[source] if (source := _viewed(node, memory)) is not None else node
            continue
        subject: Any = node.args[0]
        _require_private(node, subject, memory, order)
        value = _written(gm, node, subject)
        memory[value] = value
        order.setdefault(value, order[node])
        for user in [u for u in subject.users if order.get(u, 0) > order[node]]:
            user.replace_input_with(subject, value)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _viewed(node: fx.Node, memory: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The value before this one whose memory it may share."""
    if op_name(node) == "getitem":
        several = node.args[0]
        assert isinstance(several, fx.Node)
        if memory[several] is not several:  # parts of one value
            return several
        return next((u for u in several.users if u in memory and u.args[1:] == node.args[1:]), None)
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    schema = node.target._schema
    if not any(returned.alias_info for returned in schema.returns):
        return None
    shared = [a for a, declared in zip(node.args, schema.arguments, strict=False) if declared.alias_info]
    source = next((a for a in shared if isinstance(a, fx.Node)), None)
    old, new = (n.meta.get("val") if n is not None else None for n in (source, node))
    cast = isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.dtype != new.dtype
    return None if cast else source


def _require_private(
    node: fx.Node, subject: Any, memory: dict[fx.Node, fx.Node], order: dict[fx.Node, int]
) -> None:
    """Refuse a write into memory that is not a computed value's alone."""
    owner = memory.get(subject)
    whole = is_op(node, "copy_") and owner is subject  # a buffer that is written before it is read
    others = [n for n, of in memory.items() if of is owner and n is not subject]
    readers = [u for other in others for u in other.users if order.get(u, 0) > order[node]]
    if owner is None or readers or (owner.op != "call_function" and not whole):
        why = f"`{readers[0].name}` reads that memory afterwards" if readers else "that memory is not its own"
        raise CaptureError(
            f"cannot capture a write in place: `{node.name}` ({node.target}){_at(node)} writes into "
            f"`{subject}`, and {why}. Write it without one, with torch.cat, torch.where or a new value"
        )


def _at(node: fx.Node) -> str:
    return f" at {node.meta['source']}" if "source" in node.meta else ""


def _written(gm: fx.GraphModule, node: fx.Node, subject: Any) -> fx.Node:
    """The value that a write leaves, computed without it."""
    if is_op(node, "copy_") and same_shape(*node.args[:2]):
        value: Any = node.args[1]
        if value.meta["val"].dtype != subject.meta["val"].dtype:
            value = insert(gm, node, aten.to.dtype, value, subject.meta["val"].dtype)
            value.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
        written: fx.Node = value
        return written
    functional = getattr(aten, op_name(node).removesuffix("_"), None)
    if functional is None:
        raise CaptureError(
            f"cannot capture `{node.name}` ({node.target}){_at(node)}: it writes in place, and has no other "
            "form"
        )
    overload = node.target._overloadname  # type: ignore[union-attr]
    node.target = getattr(functional, overload if overload in functional.overloads() else "default")
    return node
