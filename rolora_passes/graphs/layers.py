"""The decoder layers of a graph, found by its structure, and the module every node belongs to.

A *cut* is a value that everything after it depends on alone: the residual stream between two blocks. The
cuts divide the nodes that tokens reach into blocks; a layer begins with a block that attends and ends
before the next one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import fx

from rolora_passes.graphs.graph import constants, is_op, op_name, root_names, site_names, upstream
from rolora_passes.graphs.operators import Trait, has


@dataclass
class Layers:
    """A graph's computation in the order it is done, weights and their expressions left out.

    Attributes:
        beside: what no token changes: rotary tables and other functions of positions.
        before: up to the first layer.
        layers: the blocks of each layer, one list of nodes a layer.
        after: from the last layer to the logits.
        weights: the nodes left out: constant expressions, and what is left of quantizers on them.
        sites: the names of linears.
    """

    beside: list[fx.Node]
    before: list[fx.Node]
    layers: list[list[fx.Node]]
    after: list[fx.Node]
    weights: set[fx.Node] = field(repr=False)
    sites: dict[fx.Node, str] = field(repr=False)

    @property
    def segments(self) -> list[list[fx.Node]]:
        """All nodes that compute, in order."""
        return [self.beside, self.before, *self.layers, self.after]

    @cached_property
    def modules(self) -> dict[fx.Node, str]:
        """The dotted name of the module a node belongs to; "" where nothing tells.

        A linear has the name of its site, and what reads other parameters that of their module. Any other
        node is in the innermost module that holds the sites it lies between.
        """
        names: dict[fx.Node, str] = {}
        for nodes in self.segments:
            own, whole = self._own(nodes), self.module_of(nodes)
            above = _reached(nodes, own, [n.all_input_nodes for n in nodes])
            reverse = nodes[::-1]
            below = _reached(reverse, own, [list(n.users) for n in reverse])
            for node in nodes:
                near = own.get(node) or _common(above[node] | below[node])
                names[node] = near if node in own or (above[node] and below[node]) else whole
        return names

    def module_of(self, nodes: list[fx.Node]) -> str:
        """The innermost module that holds every parameter that these nodes read."""
        return _common(self._own(nodes).values())

    def _own(self, nodes: list[fx.Node]) -> dict[fx.Node, str]:
        """The modules of nodes that read parameters."""
        found = {}
        for node in nodes:
            read = [a for a in node.all_input_nodes if a in self.weights]
            if read:
                found[node] = self.sites.get(node) or root_names(read[0])[0].rpartition(".")[0]
        return found


def find_layers(graph: fx.GraphModule) -> Layers:
    """The layers of a graph, in one segment `before` if nothing attends."""
    known = constants(graph)
    weights = known | {
        n for n in graph.graph.nodes if has(n, Trait.KEPT) and all(a in known for a in n.all_input_nodes)
    }
    (tokens,) = (n for n in graph.graph.nodes if n.name == "tokens")
    (output,) = graph.graph.find_nodes(op="output")
    reached = {tokens}  # through values; a size is no value
    for node in graph.graph.nodes:
        if not is_op(node, "sym_size") and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    alive = upstream([output]) - weights
    computed = [n for n in graph.graph.nodes if n in alive and n.op == "call_function"]
    stream = [n for n in computed if n in reached]
    blocks = _blocks(tokens, stream)
    before, layers, after = _grouped(blocks)
    beside = [n for n in computed if n not in reached]
    return Layers(beside, before, layers, after, weights, site_names(graph))


def _blocks(tokens: fx.Node, stream: list[fx.Node]) -> list[list[fx.Node]]:
    """The nodes between one cut and the next, the latter included."""
    place = {n: i for i, n in enumerate(stream)}
    blocks: list[list[fx.Node]] = [[]]
    farthest = max((place[u] for u in tokens.users if u in place), default=-1)
    for i, node in enumerate(stream):
        blocks[-1].append(node)
        if farthest <= i:
            blocks.append([])
        farthest = max(farthest, *(place.get(u, len(stream)) for u in node.users))
    return [b for b in blocks if b]


def _grouped(blocks: list[list[fx.Node]]) -> tuple[list[fx.Node], list[list[fx.Node]], list[fx.Node]]:
    """(before, layers, after) of blocks."""
    starts = [i for i, block in enumerate(blocks) if any(is_op(n, "attention") for n in block)]
    if not starts:
        return _flat(blocks), [], []
    layers = [_flat(blocks[a:b]) for a, b in pairwise(starts)]
    end = _end(blocks, starts[-1], layers)
    return _flat(blocks[: starts[0]]), [*layers, _flat(blocks[starts[-1] : end])], _flat(blocks[end:])


def _end(blocks: list[list[fx.Node]], start: int, layers: list[list[fx.Node]]) -> int:
    """Where the last layer ends: after the last block that a residual passes by, or, if that makes it like
    a layer before it, some blocks later (a norm that stands on the stream)."""
    forks = [
        i
        for i in range(start, len(blocks))
        if sum(blocks[i - 1][-1] in n.all_input_nodes for n in blocks[i]) > 1
    ]
    least = max(forks, default=start) + 1
    kinds = [_operators(layer) for layer in layers]
    ends = range(least, len(blocks) + 1)
    return next((end for end in ends if _operators(_flat(blocks[start:end])) in kinds), least)


def _operators(nodes: list[fx.Node]) -> list[str]:
    return [op_name(n) for n in nodes]


def _flat(blocks: list[list[fx.Node]]) -> list[fx.Node]:
    return [node for block in blocks for node in block]


def _reached(
    nodes: list[fx.Node], own: dict[fx.Node, str], edges: list[Any]
) -> dict[fx.Node, frozenset[str]]:
    """The modules nearest to every node along edges that stay among the nodes, in the order given."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node, near in zip(nodes, edges, strict=True):
        found[node] = frozenset().union(
            *({own[n]} if n in own else found[n] for n in near if n in own or n in found)
        )
    return found


def _common(names: Iterable[str]) -> str:
    """The innermost module that holds all of these."""
    parts = [name.split(".") for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
