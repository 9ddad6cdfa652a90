"""Constant expressions: what passes write on top of parameters, for FoldConstants to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import fx

from rolora_passes.graphs.graph import constants, insert_after, leaves


class Expressions:
    """Writes operations on top of constant expressions, for the computations that read them.

    One object serves one rewrite: a leaf stays the key of its expression however often it is wrapped.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        known = constants(graph)
        self.graph = graph
        self._readers = {n: [u for u in n.users if u not in known] for n in leaves(graph)}
        self._top: dict[fx.Node, fx.Node] = {}

    def wrap(self, leaf: fx.Node, target: Callable[..., Any], *args: Any) -> None:
        """Have every computation that reads the leaf's expression read `target(expression, *args)`."""
        top = self._top.get(leaf, leaf)
        after = max([top, *(a for a in args if isinstance(a, fx.Node))])
        new = insert_after(self.graph, after, target, top, *args)
        for reader in self._readers[leaf]:
            reader.replace_input_with(top, new)
        self._top[leaf] = new

    def top(self, leaf: fx.Node) -> fx.Node:
        """The leaf's expression as it stands."""
        return self._top.get(leaf, leaf)


def merge_equal(graph: fx.GraphModule, among: Collection[fx.Node] | None = None) -> None:
    """Keep one of all nodes that call the same operator on the same arguments (of those in `among`)."""
    seen: dict[object, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and (among is None or node in among):
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
