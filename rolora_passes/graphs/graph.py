"""What every pass needs of a `torch.fx.GraphModule`: copies, parameters, constants.

A graph is `forward(tokens, positions) -> logits`; both inputs int64 [B, S], logits [B, S, V]. An encoder, or
an encoder with a decoder, takes others (`graphs.inputs`).
Parameters are `get_attr` nodes whose targets are the dotted names they had in the model. What a pass
does to a parameter is nodes on top of that `get_attr`: a *constant expression*, evaluated by
FoldConstants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.graphs.devices import device_of
from rolora_passes.graphs.info import info
from rolora_passes.graphs.inputs import positions_like as positions_like
from rolora_passes.graphs.nodes import argument as argument
from rolora_passes.graphs.nodes import is_op as is_op
from rolora_passes.graphs.nodes import op_name as op_name
from rolora_passes.graphs.operators import OURS, Trait, has
from rolora_passes.graphs.sources import take_source
from rolora_passes.moved import old_names
from rolora_passes.numerics.exact import has_type

aten = torch.ops.aten

# The names of ours that are `Trait.KEPT`.
KEPT = {r.name.partition("::")[2] for r in OURS if r.traits & Trait.KEPT}


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy the structure of a graph; tensors are shared with the original."""
    target = fx.GraphModule(torch.nn.Module(), fx.Graph())
    renamed: dict[fx.Node, fx.Node] = {}
    output = target.graph.graph_copy(graph.graph, renamed)
    names = {new: old.name for old, new in renamed.items()}
    for node in target.graph.nodes:
        node._rename(names[node])
        if node.op == "get_attr":
            set_tensor(target, node.target, get_tensor(graph, node.target))
    target.graph.output(output)
    target.meta = dict(graph.meta)
    target.recompile()
    return target


def get_tensor(graph: fx.GraphModule, name: str) -> Tensor:
    """The tensor a `get_attr` target names."""
    value: Any = graph
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def set_tensor(graph: fx.GraphModule, name: str, value: Tensor) -> None:
    """Put a tensor at a dotted name: a parameter if it is floating point, else a buffer."""
    *path, leaf = name.split(".")
    owner: torch.nn.Module = graph
    for part in path:
        if not isinstance(getattr(owner, part, None), torch.nn.Module):
            owner.register_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if isinstance(value, torch.nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def delete_tensor(graph: fx.GraphModule, name: str) -> None:
    """Let go of a tensor that no node names any more."""
    *path, leaf = name.split(".")
    delattr(graph.get_submodule(".".join(path)), leaf)


def parameters(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor the graph reads, by name, in graph order."""
    return {n.target: get_tensor(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"}


def parameter_names(graph: fx.GraphModule) -> set[str]:
    """The names of the tensors the graph reads."""
    return {str(n.target) for n in graph.graph.find_nodes(op="get_attr")}


def add_parameter(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Add a tensor under a name not used yet (a number is appended) and return its node.

    What is named as part of a tensor, which has no parts, is named beside it: "w.lora_A.weight" of a linear
    whose weight is "w" becomes "w_lora_A.weight". The node stands before every node that is not a `get_attr`,
    so any expression may read it. The tensor is put where the graph's others are.
    """
    taken, count = parameter_names(graph), 0
    for dot in [i for i, letter in enumerate(name) if letter == "."]:
        if name[:dot] in taken:
            name = f"{name[:dot]}_{name[dot + 1 :]}"
    unique = name
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    set_tensor(graph, unique, beside(graph, value))
    with graph.graph.inserting_before(first_compute(graph)):
        return graph.graph.create_node("get_attr", unique, name=unique.replace(".", "_"))


def beside(graph: fx.GraphModule, value: Tensor) -> Tensor:
    """A tensor where those of a graph are, unless they have no place yet, or none for its type."""
    device = device_of(graph)
    kept = device == value.device or device.type == "meta" or not has_type(device, value.dtype)
    return value if kept else value.to(device)


def first_compute(graph: fx.GraphModule) -> fx.Node:
    """The first node that is not a parameter."""
    found: fx.Node = next(n for n in graph.graph.nodes if n.op != "get_attr")
    return found


def constants(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose value depends on parameters alone, what is left of quantizers excepted (`Trait.KEPT`)."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and not has(node, Trait.KEPT)
            and node.all_input_nodes
            and all(a in found for a in node.all_input_nodes)
        ):
            found.add(node)
    return found


def leaves(graph: fx.GraphModule) -> dict[fx.Node, None]:
    """Constant expressions as the rest of the graph sees them: the constant nodes a computation reads."""
    known = constants(graph)
    return {n: None for n in graph.graph.nodes if n in known and any(u not in known for u in n.users)}


def upstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes and everything they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def root_names(node: Any) -> list[str]:
    """Names of the parameters a constant expression is made of, its subject first."""
    seen: dict[str, None] = {}
    stack: list[fx.Node] = [node]
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            seen[str(current.target)] = None
        stack.extend(reversed(current.all_input_nodes))
    return list(seen)


def linears(graph: fx.GraphModule) -> list[fx.Node]:
    """The linear nodes whose weight is a constant expression, or the dequantized half of one.

    One that makes another's bias (a norm's, pushed through a weight) is not meant.
    """
    known, every = constants(graph), [n for n in graph.graph.nodes if is_op(n, "linear")]
    biases = upstream(bias for n in every if (bias := argument(n, "bias")) is not None)
    return [n for n in every if n not in biases and (n.args[1] in known or has(n.args[1], Trait.KEPT))]


def site_names(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """A name for every linear: the module that held its weight, numbered where a fused one was split."""
    owners: dict[str, list[fx.Node]] = {}
    known = info(graph).ways
    for node in linears(graph):
        # What was computed already is called after the weight it was.
        root = root_names(node.args[1])[0]
        owner = re.sub(r"\.weight(_q)?$", "", known[root].root if root in known else root)
        owners.setdefault(owner, []).append(node)
    return {
        node: owner if len(nodes) == 1 else f"{owner}.{i}"
        for owner, nodes in owners.items()
        for i, node in enumerate(nodes)
    }


def insert(
    graph: fx.GraphModule, before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
) -> fx.Node:
    """Insert one call before a node, from the same line of the model."""
    with graph.graph.inserting_before(before):
        new = graph.graph.call_function(target, args, kwargs)
    take_source(new, before)
    return new


def insert_after(
    graph: fx.GraphModule, after: Any, target: Callable[..., Any], *args: Any, **kwargs: Any
) -> fx.Node:
    """Insert one call right after a node, from the same line of the model."""
    with graph.graph.inserting_after(after):
        new = graph.graph.call_function(target, args, kwargs)
    take_source(new, after)
    return new


def finish(graph: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes and unused tensors, check the graph, recompile."""
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    graph.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    used = parameters(graph)
    graph._modules.clear()
    for name in [*graph._parameters, *graph._buffers]:
        delattr(graph, name)
    for name, value in used.items():
        set_tensor(graph, name, value)
    assert all(n in graph.graph.nodes for n in placeholders)
    graph.graph.lint()
    graph.recompile()
    return graph


old_names(globals())
