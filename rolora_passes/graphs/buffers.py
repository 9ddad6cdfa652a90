"""What a graph with buffers computes of constants alone, and which buffers it writes to."""

from __future__ import annotations

import torch
from torch import fx

_ASSERTIONS = (torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_constrain_range_for_size.default)


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on parameters and numbers alone; a buffer that is written to is not one."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            if not is_written(node):
                found.add(node)
        elif node.op == "call_function" and found.issuperset(node.all_input_nodes):
            found |= {node} if node.all_input_nodes or _counts(node) else set()
    return found


def _counts(node: fx.Node) -> bool:
    """Whether a node without operands gives one tensor, always (arange(8), not rand(8))."""
    target = node.target
    seeded = torch.Tag.nondeterministic_seeded
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and seeded not in target.tags
    )


def is_written(node: fx.Node) -> bool:
    """Whether a node is a buffer that some operator writes to."""
    return node.op == "get_attr" and any(
        isinstance(user.target, torch._ops.OpOverload)
        and any(
            argument.alias_info is not None and argument.alias_info.is_write and given is node
            for argument, given in zip(user.target._schema.arguments, user.args, strict=False)
        )
        for user in node.users
    )


def written(graph: fx.Graph) -> list[str]:
    """The names of the buffers that some operator writes to: the state of a graph with caches."""
    return list(dict.fromkeys(str(n.target) for n in graph.nodes if is_written(n)))


def drop_unused(graph: fx.Graph) -> None:
    """Remove nodes nothing reads, except those with an effect: cache updates and assertions."""

    def has_effect(node: fx.Node) -> bool:
        target = node.target
        writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        return writes or target in _ASSERTIONS or node.is_impure()

    graph.eliminate_dead_code(is_impure_node=has_effect)
