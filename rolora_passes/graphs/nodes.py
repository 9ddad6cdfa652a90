"""Looking at one node: which operator it calls, and with what."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx

# Namespaces whose operators go by their bare names; those of another package are "acme::scale_rows".
BARE = ("aten", "rolora", "quantized_decomposed", "torchao", "llama", "prims")


def op_name(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`, `getitem` for `operator.getitem`, `placeholder` for an input.

    An operator of another package has its namespace before it, `acme::linear`: it is not ATen's.
    """
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        whole = node.target._schema.name
        namespace, _, name = whole.partition("::")
        return name if namespace in BARE else whole
    return getattr(node.target, "__name__", str(node.target))


def is_op(node: object, *names: str) -> TypeGuard[Any]:
    """Whether a value is a call of one of these operators, in any overload.

    To a type checker the node is `Any` from here: what its arguments are, its operator says.
    """
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in names


def argument(node: Any, name: str, default: Any = None) -> Any:
    """An operator's argument by the name its schema gives, or the schema's default."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = node.target._schema.arguments
    for position, declared in enumerate(schema):
        if declared.name == name:
            if position < len(node.args):
                return node.args[position]
            return declared.default_value if declared.has_default_value() else default
    return default
