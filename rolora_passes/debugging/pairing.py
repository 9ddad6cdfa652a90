"""Which values of two graphs correspond, and what to call them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

from rolora_passes.graphs.graph import is_op, op_name, site_names


@dataclass(frozen=True)
class Pair:
    """A value that two graphs share.

    Attributes:
        node, twin: its node in the graph, and in the graph that is the reference.
        kind: "embedding", "linear", "attention", "add" (of two activations: residuals) or "logits".
        site: the module a linear's weight was in; None for the others.
        layer: the number of its decoder layer, if the names of sites have one.
    """

    node: fx.Node
    twin: fx.Node
    kind: str
    site: str | None
    layer: int | None


def pair_values(graph: fx.GraphModule, reference: fx.GraphModule) -> tuple[list[Pair], dict[str, str]]:
    """The values worth comparing, in an order in which both graphs compute them; the logits come last.

    Values are paired by name: passes keep the names of values that they do not change.

    Returns: the pairs, and the names of values that cannot be compared, each with the reason.
    """
    kinds, skipped = _kinds(graph), dict[str, str]()
    others = {node.name: place for place, node in enumerate(reference.graph.nodes)}
    nodes = list(reference.graph.nodes)
    sites = sites_of(reference) | sites_of(graph)
    layers = layers_of(graph, sites)
    logits, reached, pairs = logits_of(graph), -1, []
    for node, kind in kinds.items():
        place = others.get(node.name, -1)
        if node is logits:
            continue
        if place < 0 or op_name(nodes[place]) != op_name(node):
            skipped[node.name] = "the other graph has no such value"
        elif place < reached:
            skipped[node.name] = "the other graph computes it in another order"
        else:
            reached = place
            pairs.append(Pair(node, nodes[place], kind, sites.get(node.name), layers.get(node)))
    pairs.append(Pair(logits, logits_of(reference), "logits", sites.get(logits.name), layers.get(logits)))
    return pairs, skipped


def sites_of(graph: fx.GraphModule) -> dict[str, str]:
    """The name of every linear's module, by the linear's node name."""
    return {node.name: site for node, site in site_names(graph).items()}


def layers_of(graph: fx.GraphModule, sites: dict[str, str]) -> dict[fx.Node, int]:
    """The decoder layer of every value after the first linear: its own, or else the latest that it reads."""
    layers: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        site = sites.get(node.name)
        number = re.search(r"\.(\d+)\.", site) if site else None
        above = [layers[n] for n in node.all_input_nodes if n in layers]
        if number:
            layers[node] = int(number[1])
        elif above and site is None:
            layers[node] = max(above)
    return layers


def logits_of(graph: fx.GraphModule) -> fx.Node:
    """The value a graph returns."""
    (output,) = graph.graph.find_nodes(op="output")
    found: fx.Node = output.args[0]
    return found


def _kinds(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """Values worth comparing; elementwise results follow from these and would only cost time."""
    linears, reached, kinds = site_names(graph), set[fx.Node](), dict[fx.Node, str]()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
        if node not in reached:
            continue  # it depends on parameters only
        if is_op(node, "embedding", "attention"):
            kinds[node] = op_name(node)
        elif node in linears:
            kinds[node] = "linear"
        elif is_op(node, "add") and all(a in reached for a in node.args[:2]):
            kinds[node] = "add"
    return kinds
