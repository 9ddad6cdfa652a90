"""Casts around canonical nodes go: which type each value of a graph has, and why.

Normalisations, rotary embedding and attention compute in float32 at least and return the type of x. What a model
in half precision widens for their sake, and rounds after them, they do themselves:

    to(rms_norm(to(x, float32)), bfloat16)              ->  rms_norm(x)
    to(mul(layer_norm(to(x, float32)), gain), bfloat16) ->  mul(layer_norm(x), to(gain, bfloat16))
    rotary_embedding(x, to(cos, bfloat16), ..)          ->  rotary_embedding(x, cos, ..)

A cast to a narrower type is followed up to the casts that widened: if these nodes alone stand between, all of
them compute in the narrow type. Other islands of a wider type (a router, a softmax of its own) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.graphs.graph import aten, constants, insert, is_op

CASTS = ("to", "_to_copy", "type_as")
_MOVES = (
    "transpose", "permute", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "slice",
)  # fmt: skip


def is_cast(node: object) -> bool:
    """Whether a node casts one floating-point type to another, or to itself; types are as capture noted them."""
    return is_op(node, *CASTS) and _is_float(node) and _is_float(node.args[0])


def bare(node: Any) -> Any:
    """A value without the casts between floating-point types above it."""
    while is_cast(node):
        node = node.args[0]
    return node


def absorb(gm: fx.GraphModule) -> None:
    """Take casts into the canonical nodes they stand around."""
    for node in gm.graph.nodes:
        if is_op(node, "rotary_embedding"):
            node.args = (node.args[0], *map(bare, node.args[1:3]), *node.args[3:])
    known = constants(gm)
    for node in list(gm.graph.nodes):
        if is_cast(node) and node not in known and _size(node) < _size(node.args[0]):
            new = _narrow(gm, node, node.args[0], known)
            if new is not None:
                node.replace_all_uses_with(new)


def _narrow(gm: fx.GraphModule, cast: fx.Node, node: Any, known: set[fx.Node]) -> fx.Node | None:
    """`node`, which stands above `cast`, computed in the type of `cast`; None if that is not for it to say."""
    dtype = cast.meta["val"].dtype
    if node in known:
        return cast_to(gm, cast, node, dtype)
    if not _is_float(node) or node.meta["val"].dtype == dtype:
        return node  # type: ignore[no-any-return]
    if is_cast(node):
        return _narrow(gm, cast, node.args[0], known)
    subjects: tuple[Any, ...]
    if is_op(node, "rms_norm", "layer_norm", "rotary_embedding", *_MOVES):
        subjects = node.args[:1]
    elif is_op(node, "attention"):
        subjects = node.args[:3]
    elif _is_affine(node, known):
        subjects = node.args[:2]
    else:
        return None
    narrow = {subject: _narrow(gm, cast, subject, known) for subject in subjects}
    if any(new is None for new in narrow.values()):
        return None
    with gm.graph.inserting_before(cast):
        new = gm.graph.node_copy(node, lambda n: narrow.get(n) or n)
    new.meta["val"] = node.meta["val"].to(dtype)
    return new


def _is_affine(node: Any, known: set[fx.Node]) -> bool:
    """Whether a node is a norm's gain or bias: `norm * gain`, or `norm * gain + bias`."""
    if not is_op(node, "mul", "add") or len(node.all_input_nodes) != 2:
        return False
    values = [a for a in node.all_input_nodes if a not in known]
    if len(values) != 1:
        return False
    value = bare(values[0])
    return is_op(value, "rms_norm", "layer_norm") or (is_op(node, "add") and _is_affine(value, known))


def cast_to(gm: fx.GraphModule, before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A node in another type, cast before `before`; itself if it has that type."""
    if node.meta["val"].dtype == dtype:
        return node
    if is_cast(node) and node.args[0].meta["val"].dtype == dtype:
        return node.args[0]  # type: ignore[no-any-return]
    new = insert(gm, before, aten.to.dtype, node, dtype)
    new.meta["val"] = node.meta["val"].to(dtype)
    return new


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def _size(node: Any) -> int:
    size: int = node.meta["val"].dtype.itemsize
    return size


def retyped(value: Any, change: Callable[[torch.dtype], torch.dtype]) -> Any:
    """A node's arguments with every floating-point type that is written in them changed."""
    return fx.node.map_aggregate(
        value, lambda v: change(v) if isinstance(v, torch.dtype) and v.is_floating_point else v
    )
