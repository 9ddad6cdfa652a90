"""Choosing linears: by pattern over their names, or by what they are in the graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import is_op


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
        PassError: from the pass `name`; says how sites are named.
    """
    known = list(sites)
    if not any(matches(site, targets) for site in known):
        raise PassError(f"{name}: no linear matches {targets!r}; sites are named like {', '.join(known[:4])}")


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
    """Whether a linear's result reaches the output through nothing that mixes channels."""
    return any(
        u.op == "output" or (is_op(u, "mul", "div", "tanh", "to", "slice", "add") and is_head(u))
        for u in node.users
    )
