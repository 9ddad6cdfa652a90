"""Choosing linears: by pattern over their names, or by what they are in the graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.operators import Trait, has


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a site is meant by "all-linear", by its last parts ("q_proj"), or by "re:…" (full match)."""
    patterns = [targets] if isinstance(targets, str) else targets
    return any(pattern == "all-linear" or _matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return _ends(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise PassError(f"targets: {pattern!r} is not a regular expression: {error}") from error


def require_match(name: str, targets: str | Sequence[str], sites: Iterable[str]) -> None:
    """Refuse targets that mean nothing in a graph: a misspelt one would pass unnoticed.

    Raises:
        PassError: from the pass `name`; says which there are.
    """
    known = list(sites)
    if not any(matches(site, targets) for site in known):
        raise PassError(f"{name}: no linear matches {targets!r}; there are {', '.join(last_parts(known))}")


def last_parts(sites: Iterable[str]) -> list[str]:
    """The shortest targets by which sites are meant, each once; a split projection's is the whole's."""
    return [*dict.fromkeys(re.sub(r"\.\d+$", "", site).rpartition(".")[2] for site in sites)]


def _ends(name: str, pattern: str) -> bool:
    """A split projection's part ("qkv_proj.0") is also meant by the whole's name."""
    stem = re.sub(r"\.\d+$", "", name)
    return any(n == pattern or n.endswith("." + pattern) for n in (name, stem))


def attention_roles(graph: fx.GraphModule) -> dict[fx.Node, set[str]]:
    """Linears that make the "queries", "keys" and "values" of attention, through nothing that is linear."""
    found: dict[fx.Node, set[str]] = {}
    for node in graph.graph.nodes:
        operands = node.args[:3] if is_op(node, "attention") else ()
        for role, operand in zip(("queries", "keys", "values"), operands, strict=False):
            stack, seen = [operand], set()
            while stack:
                value = stack.pop()
                if is_op(value, "linear"):
                    found.setdefault(value, set()).add(role)
                elif value not in seen:
                    seen.add(value)
                    stack.extend(value.all_input_nodes)
    return found


def is_head(node: fx.Node) -> bool:
    """Whether a linear makes what the graph returns."""
    return node in heads(node.graph)


def heads(graph: fx.Graph) -> set[fx.Node]:
    """The linear that makes the output, alone or as a sum with its branches; none if none does.

    A residual stream is a sum too, but of linears that read different values, or of these and something else.
    """
    found, known = set[fx.Node](), _constants(graph)
    for value in graph.output_node().all_input_nodes:
        summands = _summands(value, known)
        if all(is_op(s, "linear") for s in summands) and len({_read_by(s) for s in summands}) == 1:
            found |= summands
    return found


def _constants(graph: fx.Graph) -> set[fx.Node]:
    known = set[fx.Node]()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (inputs and all(n in known for n in inputs)):
            known.add(node)
    return known


def _summands(value: fx.Node, known: set[fx.Node]) -> set[fx.Node]:
    """What a value is the sum of, looking back through operators that mix no channels."""
    found, stack = set[fx.Node](), [value]
    while stack:
        node = stack.pop()
        computed = [n for n in node.all_input_nodes if n not in known]
        if is_op(node, "add", "sub") or (has(node, Trait.ON_LOGITS) and len(computed) == 1):
            stack.extend(computed)
        else:
            found.add(node)
    return found


def _read_by(linear: fx.Node) -> fx.Node:
    """What a linear reads; for the second half of a branch, what its first half reads."""
    value = linear.all_input_nodes[0]
    while is_op(value, "linear", "mul", "to"):
        value = value.all_input_nodes[0]
    return value


def routers(graph: fx.GraphModule) -> set[fx.Node]:
    """Linears whose output decides which experts run: their scores reach a choice, such as of the largest k.

    An error there changes what is computed, not only how exactly.
    """
    head = heads(graph.graph)
    return {n for n in graph.graph.nodes if is_op(n, "linear") and n not in head and _chosen_by(n)}


def _chosen_by(linear: fx.Node) -> bool:
    stack, seen = [*linear.users], set[fx.Node]()
    while stack:
        node = stack.pop()
        if has(node, Trait.CHOOSES):
            return True
        if node not in seen and has(node, Trait.ON_LOGITS | Trait.ON_SCORES):
            seen.add(node)
            stack.extend(node.users)
    return False


def by_name_only(graph: fx.GraphModule, shapes: Mapping[fx.Node, Any]) -> dict[fx.Node, str]:
    """Linears that "all-linear" does not mean, each with the reason: only a target of their own does.

    Args:
        shapes: of the weights, as `infer_shapes` knows them.
    """
    found = dict.fromkeys(routers(graph), "a router: its scores choose which experts run")
    head = heads(graph.graph)
    for node in graph.graph.nodes:
        weight = shapes.get(node.args[1]) if is_op(node, "linear") and node not in head else None
        if weight is not None and weight.shape[0] == 1 and not any(is_op(u, "linear") for u in node.users):
            found.setdefault(node, "a gate: one number that scales all of a branch")
    return {node: f"{why}; name it in targets to mean it" for node, why in found.items()}


def named(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a site is meant by a pattern of its own, not by "all-linear" alone."""
    patterns = [targets] if isinstance(targets, str) else targets
    return any(pattern != "all-linear" and _matches(name, pattern) for pattern in patterns)


def why_left(
    node: fx.Node,
    name: str,
    targets: str | Sequence[str],
    exclude: Sequence[str],
    special: Mapping[fx.Node, str],
) -> str | None:
    """Why options leave a linear as it is; None if they mean it.

    Args:
        special: linears that only a pattern of their own means (`by_name_only`).
    """
    if not matches(name, targets) or matches(name, exclude):
        return "left in floating point by the options"
    return special.get(node) if not named(name, targets) else None
