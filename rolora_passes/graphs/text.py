"""A graph as text: one line a node, stable enough to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.graph import get_tensor, op_name


def graph_text(graph: fx.GraphModule) -> str:
    """One line a node: `y = linear(x, model.layers.0.mlp.up_proj.weight)`; parameters by name and shape."""
    lines = []
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            tensor = get_tensor(graph, node.target)
            lines.append(f"{node.target}: {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}")
        elif node.op == "placeholder":
            lines.append(f"input {node.name}")
        elif node.op == "output":
            lines.append(f"return {_show(node.args[0])}")
        else:
            arguments = [_show(a) for a in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{node.name} = {op_name(node)}({', '.join(arguments)})")
    return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return repr(value)
