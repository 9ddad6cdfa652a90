"""FoldConstants: evaluate what the passes wrote about each parameter, once, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import (
    add_parameter,
    delete_tensor,
    dtype_of,
    finish,
    get_tensor,
    leaves,
    parameters,
    root_names,
    set_tensor,
)
from rolora_passes.passes import Pass, Report


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Turn every constant expression into a parameter.

    Before:                                              After:
        linear(x, hadamard(rotate(mul(W, g), R1, 0), f))     linear(x, W')

    Each expression is evaluated in float64 and cast once, to the graph's type; one at a time, and an
    operand is dropped when nothing needs it any more, so the working memory is that of one parameter.
    Quantizers fold to their integers and scales; the dequantization stays in the graph.

    Raises:
        PassError: an expression came out NaN or infinite; names the parameter.
    """

    ensures: ClassVar[tuple[str, ...]] = ("folded",)

    def run(self, graph: fx.GraphModule) -> Report:
        report = Report()
        dtype = dtype_of(graph)
        ends = [node for node in leaves(graph) if node.op != "get_attr"]
        for node in ends:
            roots = root_names(node)
            value = evaluate(graph, node)
            if value.is_floating_point():
                if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
                    raise PassError(f"fold-constants: {roots[0]} came out NaN or infinite ({node.format_node()})")
                value = value.to(torch.float32 if _is_scale(node) else dtype)
            suffix = _suffix(node)
            folded = add_parameter(graph, roots[0] + (suffix or "_folded"), value.contiguous())
            node.replace_all_uses_with(folded)
            _forget(graph, node)
            if not suffix:
                _reclaim(graph, folded, roots[0])
            report.changed.append(roots[0])
        finish(graph)
        return report


def evaluate(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a constant expression, computed in float64."""
    done: dict[fx.Node, Tensor] = {}

    def value(operand: fx.Node) -> Tensor:
        if operand not in done:
            if operand.op == "get_attr":
                tensor = get_tensor(graph, str(operand.target)).detach()
                done[operand] = tensor.double() if tensor.is_floating_point() else tensor
            else:
                args = fx.node.map_arg(operand.args, value)
                kwargs = fx.node.map_arg(operand.kwargs, value)
                done[operand] = operand.target(*args, **kwargs)  # type: ignore[operator]
                for used in operand.all_input_nodes:  # no other expression may keep it alive
                    if len(used.users) == 1:
                        done.pop(used, None)
        return done[operand]

    with torch.no_grad():
        return value(node)


def _is_scale(node: fx.Node) -> bool:
    return any("choose_scale" in str(n.target) for n in (node, *node.all_input_nodes))


def _suffix(node: fx.Node) -> str:
    if _is_scale(node) and "quantize" not in str(node.target):
        return "_scale"
    return "_q" if "quantize" in str(node.target) else ""


def _reclaim(graph: fx.GraphModule, folded: fx.Node, name: str) -> None:
    """Give the result the name of the parameter it came from, if nothing reads that one any more."""
    if name not in parameters(graph):
        value = get_tensor(graph, str(folded.target))
        delete_tensor(graph, str(folded.target))
        set_tensor(graph, name, value)
        folded.target = name


def _forget(graph: fx.GraphModule, node: fx.Node) -> None:
    """Erase an expression and the tensors only it read, at once: they are the model's size."""
    stack, gone = [node], set()
    while stack:
        dead = stack.pop()
        if dead.users or dead in gone:
            continue
        gone.add(dead)
        stack.extend(dead.all_input_nodes)
        graph.graph.erase_node(dead)
        if dead.op == "get_attr":
            delete_tensor(graph, str(dead.target))
