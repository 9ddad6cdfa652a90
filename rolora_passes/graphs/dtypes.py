"""The types that a graph computes in, and a graph converted to another, or moved to another device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import GraphFormatError
from rolora_passes.graphs.devices import Device, find_device, moved_to, written_for
from rolora_passes.graphs.graph import copy_graph, finish, get_tensor, is_op, set_tensor, upstream
from rolora_passes.graphs.operators import Trait, has
from rolora_passes.graphs.shapes import infer_shapes


def dtype_of(graph: fx.GraphModule) -> torch.dtype:
    """The working precision: the floating-point type that most of the parameters' elements are read in.

    Rotations that are not folded yet do not count: they are held in float64.
    """
    elements: dict[torch.dtype, int] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = get_tensor(graph, str(node.target))
        turns = all(is_op(user, "rotate") and user.args[1] is node for user in node.users)
        if value.is_floating_point() and not (turns and node.users):
            dtype = _read_as(node) or value.dtype
            elements[dtype] = elements.get(dtype, 0) + value.numel()
    if not elements:
        raise GraphFormatError("expected a graph with floating-point parameters, found none")
    return max(elements, key=lambda dtype: elements[dtype])


def _read_as(node: fx.Node) -> torch.dtype | None:
    """The type that every reader of a parameter casts it to, as of a checkpoint in another type."""
    types = {user.args[1] if is_op(user, "to") else None for user in node.users}
    (only,) = types if len(types) == 1 else (None,)
    return only if isinstance(only, torch.dtype) else None


def convert(graph: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy of the graph that computes in `dtype`, as canonical as the graph: casts without effect go.

    Parameters and types written in the graph change. What stood in a wider type than the rest (a router, a
    gain) is not narrowed below it, nor is what rotary tables are made of: angles need float32.
    """
    result, own = copy_graph(graph), dtype_of(graph)
    turning = [n for n in result.graph.nodes if is_op(n, "rotary_embedding")]
    angles = upstream(table for n in turning for table in n.args[1:3])

    def change(node: fx.Node, found: torch.dtype) -> torch.dtype:
        if found.itemsize > own.itemsize:
            return torch.promote_types(found, dtype)
        return torch.promote_types(torch.float32, dtype) if node in angles else dtype

    for node in result.graph.nodes:
        if node.op == "get_attr":
            value = get_tensor(result, node.target)
            if value.is_floating_point() and not _read_as(node):  # else the cast changes
                set_tensor(result, node.target, value.detach().to(change(node, value.dtype)))
        else:
            node.args, node.kwargs = retyped((node.args, node.kwargs), partial(change, node))
    _drop_casts(result)
    return finish(result)


def to_device(graph: fx.GraphModule, device: Device) -> fx.GraphModule:
    """A copy of a graph whose tensors, and the devices written in it, are on this one.

    Args:
        device: "cpu", "cuda:1", …, as `graphs.devices.find_device` takes it. On MPS, which has no float64,
            tensors of that type (rotations that are not folded yet) become float32.

    Raises:
        DeviceError: torch has no such device here.
    """
    result, place, moved = copy_graph(graph), find_device(device), dict[int, Tensor]()
    for node in result.graph.nodes:
        if node.op == "get_attr":
            old = get_tensor(result, node.target)
            if id(old) not in moved:  # a tied tensor is moved once
                moved[id(old)] = moved_to(old, place)
            set_tensor(result, node.target, moved[id(old)])
        node.kwargs = written_for(node.kwargs, place)
    result.recompile()
    return result


def _drop_casts(graph: fx.GraphModule) -> None:
    """Casts of a value to the type it has go."""
    casts = [n for n in graph.graph.nodes if has(n, Trait.CAST)]
    types = infer_shapes(graph, only=upstream(casts))
    for node in casts:
        before, after = types[node.args[0]], types[node]
        if after is not None and before is not None and before.dtype == after.dtype:
            node.replace_all_uses_with(node.args[0])


def retyped(value: Any, change: Callable[[torch.dtype], torch.dtype]) -> Any:
    """A node's arguments with every floating-point type that is written in them changed."""
    return fx.node.map_aggregate(
        value, lambda v: change(v) if isinstance(v, torch.dtype) and v.is_floating_point else v
    )
