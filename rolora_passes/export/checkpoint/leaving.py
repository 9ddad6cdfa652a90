"""Leaving out of a graph what a checkpoint does not hold: roundings of activations, and what cancels."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.checkpoint.matching import ROUNDING, quantizes, stored
from rolora_passes.graphs.expressions import merge_equal
from rolora_passes.graphs.graph import copy_graph, finish, is_op
from rolora_passes.graphs.operators import Trait, has

LEFT_OUT = tuple(ROUNDING)
"""What can be left out on request. Without it the graph rounds less; nothing else of its function changes."""


def without(graph: fx.GraphModule, what: Collection[str]) -> tuple[fx.GraphModule, dict[str, int]]:
    """A copy of a graph without what is asked for, and without what does nothing.

    Observers give the values that they see, and one orthogonal transform of both queries and keys cancels in
    their product: a checkpoint needs neither.

    Args:
        what: of `LEFT_OUT`.

    Returns: the copy, and how many of each there were.

    Raises:
        LoweringError: something else is to be left out.
    """
    if unknown := [name for name in what if name not in LEFT_OUT]:
        raise LoweringError(f"expected to leave out {' or '.join(LEFT_OUT)}, found {unknown[0]!r}")
    result, counts = copy_graph(graph), dict.fromkeys(what, 0)
    for node in list(result.graph.nodes):
        if is_op(node, "observed"):
            node.replace_all_uses_with(node.args[0])
    kinds = {n: quantizes(n) for n in result.graph.nodes if has(n, Trait.FAKE_QUANTIZES)}
    for node, kind in kinds.items():
        if kind in what:
            node.replace_all_uses_with(node.args[0])
            counts[kind] += 1
    for node in result.graph.nodes:
        if is_op(node, "attention"):
            _cancel(node)
    merge_equal(result, stored(result))  # a table that two readers have alike is one table
    return finish(result), counts


def _cancel(attention: Any) -> None:
    """Take one transform away from queries and keys, if both have the same."""
    query, key = attention.args[:2]
    if is_op(query, "hadamard", "kronecker") and is_op(key, "hadamard", "kronecker"):
        same = query.target is key.target and query.args[1:] == key.args[1:] and query.kwargs == key.kwargs
        if same:
            attention.update_arg(0, query.args[0])
            attention.update_arg(1, key.args[0])
