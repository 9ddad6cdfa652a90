"""Casts around canonical nodes go: which type each value of a graph has, and why.

Normalisations, rotary embedding and attention compute in float32 at least and return the type of x. What a
model in half precision widens for their sake, and rounds after them, they do themselves:

    to(rms_norm(to(x, float32)), bfloat16)              ->  rms_norm(x)
    to(mul(layer_norm(to(x, float32)), gain), bfloat16) ->  mul(layer_norm(x), to(gain, bfloat16))
    rotary_embedding(x, to(cos, bfloat16), ..)          ->  rotary_embedding(x, cos, ..)

A cast to a narrower type is followed up to the casts that widened: if these nodes alone stand between, all of
them compute in the narrow type. Other islands of a wider type (a router, a softmax of its own) stay as they
are, and a parameter that is only read in a wider type is held in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.graphs.graph import aten, constants, get_tensor, insert, is_op, set_tensor
from rolora_passes.graphs.operators import Trait, has


def is_cast(node: object) -> bool:
    """Whether a node casts one floating-point type to another, or to itself, by the types capture noted."""
    return has(node, Trait.CAST) and _is_float(node) and _is_float(node.args[0])


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
    narrow = _Narrow(gm)
    for node in list(gm.graph.nodes):
        if is_cast(node) and node not in narrow.known and _size(node) < _size(node.args[0]):
            new = narrow.value(node, node.args[0])
            if new is not None:
                node.replace_all_uses_with(new)
    gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for node in gm.graph.find_nodes(op="get_attr"):
        _hold_wide(gm, node)


def _hold_wide(gm: fx.GraphModule, node: Any) -> None:
    types = {u.meta["val"].dtype if is_cast(u) else None for u in node.users}
    if len(types) == 1 and None not in types and _size(next(iter(node.users))) > _size(node):
        value = get_tensor(gm, node.target).detach().to(types.pop())
        set_tensor(gm, node.target, value)
        node.meta["val"] = value
        for reader in list(node.users):
            reader.replace_all_uses_with(node)


class _Narrow:
    """Values computed in the narrower type that they are cast to; what stands above two casts, once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.known = gm, constants(gm)
        self._made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def value(self, cast: fx.Node, node: Any) -> fx.Node | None:
        """`node`, which stands above `cast`, in the type of `cast`; None where that type is not for it."""
        dtype = cast.meta["val"].dtype
        if node in self.known:
            return cast_to(self.gm, cast, node, dtype)  # type: ignore[no-any-return]
        if not _is_float(node) or node.meta["val"].dtype == dtype:
            return node  # type: ignore[no-any-return]
        if is_cast(node):
            return self.value(cast, node.args[0])
        if (node, dtype) not in self._made:
            parts = {part: self.value(cast, part) for part in self._subjects(node)}
            if not parts or None in parts.values():
                return None
            with self.gm.graph.inserting_before(cast):
                new = self.gm.graph.node_copy(node, lambda n: parts.get(n) or n)
            new.meta["val"] = node.meta["val"].to(dtype)
            self._made[node, dtype] = new
        return self._made[node, dtype]

    def _subjects(self, node: Any) -> tuple[Any, ...]:
        """The operands whose type is the result's."""
        if is_op(node, "rms_norm", "layer_norm", "rotary_embedding", "slice") or has(node, Trait.VIEW):
            return node.args[:1]  # type: ignore[no-any-return]
        if is_op(node, "attention"):
            return node.args[:3]  # type: ignore[no-any-return]
        return node.args[:2] if _is_affine(node, self.known) else ()


def _is_affine(node: Any, known: set[fx.Node]) -> bool:
    """Whether a node is a norm's gain or bias: `norm * gain`, or `norm * gain + bias`."""
    if not is_op(node, "mul", "add") or len(node.all_input_nodes) != 2:
        return False
    values = [a for a in node.all_input_nodes if a not in known]
    if len(values) != 1:
        return False
    value = bare(values[0])
    return is_op(value, "rms_norm", "layer_norm") or (is_op(node, "add") and _is_affine(value, known))


def cast_to(gm: fx.GraphModule, before: fx.Node, node: Any, dtype: torch.dtype) -> Any:
    """A node in another type, cast before `before`; itself if it has that type."""
    if node.meta["val"].dtype == dtype:
        return node
    if is_cast(node) and node.args[0].meta["val"].dtype == dtype:
        return node.args[0]
    new = insert(gm, before, aten.to.dtype, node, dtype)
    new.meta["val"] = node.meta["val"].to(dtype)
    return new


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def _size(node: Any) -> int:
    size: int = node.meta["val"].dtype.itemsize
    return size
