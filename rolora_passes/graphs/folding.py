"""Folding: what the passes wrote about each parameter becomes that parameter, once, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.evaluate import blocks, cut
from rolora_passes.graphs.expressions import merge_equal
from rolora_passes.graphs.graph import (
    add_parameter,
    constants,
    delete_tensor,
    finish,
    get_tensor,
    is_op,
    leaves,
    parameter_names,
    root_names,
    set_tensor,
)
from rolora_passes.graphs.lineage import Way, keep_ways, ways
from rolora_passes.graphs.operators import Trait, has, operator_of
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.memory import release
from rolora_passes.ondisk import Growing


def fold(graph: fx.GraphModule) -> list[str]:
    """Make a parameter of every constant expression of a graph, in place.

    Each expression is evaluated in float64 and cast once, to the type that it has in the graph (a router may
    be in float32 where the rest is in bfloat16); one at a time, and an operand is dropped when nothing needs
    it any more, so the working memory is that of one parameter. Quantizers fold to their integers and scales;
    the dequantization stays in the graph.

    Returns: the names of the parameters that expressions were of.

    Raises:
        PassError: an expression came out NaN or infinite; names the parameter.
    """
    changed = []
    traced = _lasting(ways(graph), constants(graph))
    merge_equal(graph, constants(graph))  # a table that two readers quantize alike is one table
    types = infer_shapes(graph, only=constants(graph))
    groups: dict[Any, list[fx.Node]] = {}  # a quantizer's integers and scales come from one value
    for node in leaves(graph):
        if node.op != "get_attr":
            groups.setdefault((root_names(node)[0], cut(graph, node)), []).append(node)
    named: list[tuple[fx.Node, str]] = []
    for number, ((root, _), nodes) in enumerate(groups.items()):
        for node, value in zip(nodes, _folded(graph, nodes, root, types), strict=True):
            named.append((_replace(graph, node, root, value), root))
        if number % 8 == 7:
            release()
        changed.append(root)
    for folded, root in named:  # only now: another parameter's expression may have read this one
        if str(folded.target).startswith(f"{root}_folded"):
            _reclaim(graph, folded, root)
    finish(graph)
    keep_ways(graph, traced)
    return list(dict.fromkeys(changed))


def _folded(
    graph: fx.GraphModule, nodes: list[fx.Node], root: str, types: Mapping[fx.Node, Any]
) -> list[Tensor]:
    """The values of expressions over one parameter in the types that they are to have, block by block."""
    made: list[Growing] = []
    for place, parts in blocks(graph, nodes, torch.float64):
        for node, part in zip(nodes, parts, strict=True):
            if part.is_floating_point():
                _require_finite(part, node, root)
        if not made:
            kinds = [_kind(node, part, types) for node, part in zip(nodes, parts, strict=True)]
            shapes = [part.shape if place.whole else (place.count, *part.shape[1:]) for part in parts]
            made = [Growing(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
        for growing, part in zip(made, parts, strict=True):
            growing.append(part)
    return [growing.finish() for growing in made]


def _kind(node: fx.Node, value: Tensor, types: Mapping[fx.Node, Any]) -> torch.dtype:
    if not value.is_floating_point():
        return value.dtype
    found: torch.dtype = torch.float32 if _is_scale(node) else types[node].dtype
    return found


def rounds(graph: fx.GraphModule) -> bool:
    """Whether folding computes what a quantizer rounds: in float64 some ties break otherwise than before."""
    return any(has(n, Trait.QUANTIZES) for n in graph.graph.nodes)


def _lasting(traced: dict[fx.Node, Way], known: set[fx.Node]) -> dict[fx.Node, Way]:
    """The ways of the linears that stay.

    A weight that is multiplied into a table too (keys of relative positions) takes no adapter after that.
    """
    tables = {way.root for node, way in traced.items() if node in known}
    reason = "its product with a table was folded: add the adapter before fold-constants"
    return {
        node: dataclasses.replace(way, reason=reason) if way.root in tables else way
        for node, way in traced.items()
        if node not in known
    }


def _require_finite(value: Tensor, node: fx.Node, root: str) -> None:
    if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
        raise PassError(f"fold-constants: {root} came out NaN or infinite ({node.format_node()})")


def _replace(graph: fx.GraphModule, node: fx.Node, root: str, value: Tensor) -> fx.Node:
    folded = add_parameter(graph, root + (_suffix(node) or "_folded"), value)
    node.replace_all_uses_with(folded)
    _forget(graph, node)
    return folded


def _is_scale(node: fx.Node) -> bool:
    return _suffix(node) == "_scale"


def _suffix(node: fx.Node) -> str:
    """What part of a quantized weight an expression is, by what its parameter is called."""
    made, part = (node.args[0], node.args[1]) if is_op(node, "getitem") else (node, 0)
    known = operator_of(made)
    return known.folded[part] if known is not None and known.folded else ""


def _reclaim(graph: fx.GraphModule, folded: fx.Node, name: str) -> None:
    """Give the result the name of the parameter it came from, if nothing reads that one any more."""
    if name not in parameter_names(graph):
        value = get_tensor(graph, str(folded.target))
        delete_tensor(graph, str(folded.target))
        set_tensor(graph, name, value)
        folded.target = name


def _forget(graph: fx.GraphModule, node: fx.Node) -> None:
    """Erase an expression and the tensors only it read, at once: they are the model's size."""
    stack, gone = [node], set()
    while stack:
        dead = stack.pop()
        if dead.users or dead in gone:
            continue
        gone.add(dead)
        stack.extend(dead.all_input_nodes)
        graph.graph.erase_node(dead)
        if dead.op == "get_attr":
            delete_tensor(graph, str(dead.target))
