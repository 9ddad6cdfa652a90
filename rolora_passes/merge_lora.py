"""MergeLoRA: fold low-rank branches into the weights they stand beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from rolora_passes.graphs.graph import aten, constants, finish, insert, is_op, site_names
from rolora_passes.passes import Pass, Report


@dataclass(frozen=True)
class MergeLoRA(Pass):
    """Replace every low-rank branch by an expression on the weight.

    Before:                                               After:
        y' = linear(x, W, b)                                  y = linear(x, W + (B @ A) * s, b)
        y = y' + linear(linear(x, A), B) * s

    Branches are found by structure, so it does not matter what made them, nor in which basis they are.
    """

    forbids: ClassVar[tuple[str, ...]] = ("weights quantized",)

    def run(self, graph: fx.GraphModule) -> Report:
        report = Report()
        names, known = site_names(graph), constants(graph)
        for node in list(graph.graph.nodes):
            branch = _branch(node, known)
            if branch is None:
                continue
            linear, a, b, scale = branch
            product = insert(graph, linear, aten.matmul.default, b, a)
            scaled = insert(graph, linear, aten.mul.Tensor, product, scale)
            merged = insert(graph, linear, aten.add.Tensor, linear.args[1], scaled)
            linear.update_arg(1, merged)
            node.replace_all_uses_with(linear)
            report.changed.append(names[linear])
            report.moved.add(linear.name)
        finish(graph)
        return report


def _branch(node: fx.Node, known: set[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """(linear, A, B, scale) if a node adds a low-rank branch to a linear that reads the same value."""
    if not is_op(node, "add"):
        return None
    for linear, scaled in (node.args[:2], node.args[1::-1]):
        if not (is_op(linear, "linear") and is_op(scaled, "mul") and is_op(scaled.args[0], "linear")):
            continue
        high, scale = scaled.args[:2]
        low = high.args[0]
        if not is_op(low, "linear") or low.args[0] is not linear.args[0] or len(high.args) > 2 or len(low.args) > 2:
            continue
        if isinstance(scale, (int, float)) and {linear.args[1], low.args[1], high.args[1]} <= known:
            return linear, low.args[1], high.args[1], float(scale)
    return None
