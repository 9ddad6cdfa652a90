"""MergeLoRA: fold low-rank branches into the weights they stand beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from rolora_passes.graphs.graph import argument, aten, constants, finish, insert, is_op, site_names
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
            found = _branch(node, known)
            if found is None:
                continue
            linear, low, high, scale = found
            product = insert(graph, node, aten.matmul.default, high.args[1], low.args[1])
            scaled = insert(graph, node, aten.mul.Tensor, product, scale)
            weight = insert(graph, node, aten.add.Tensor, linear.args[1], scaled)
            bias = _merged_bias(graph, node, linear, low, high, scale)
            tensors = (weight,) if bias is None else (weight, bias)
            merged = insert(graph, node, aten.linear.default, linear.args[0], *tensors)
            known.update(tensors)
            node.replace_all_uses_with(merged)
            names[merged] = names[linear]
            report.changed.append(names[linear])
        finish(graph)
        return report


def _merged_bias(
    graph: fx.GraphModule, before: fx.Node, linear: fx.Node, low: fx.Node, high: fx.Node, scale: float
) -> fx.Node | None:
    """b + s·(B·a + b') where the branch's halves have biases a and b' (fuse-norm gives them some)."""
    own: fx.Node | None
    own, inner, outer = (argument(n, "bias") for n in (linear, low, high))
    branch = (
        outer if inner is None else insert(graph, before, aten.linear.default, inner, high.args[1], outer)
    )
    if branch is None:
        return own
    scaled = insert(graph, before, aten.mul.Tensor, branch, scale)
    return scaled if own is None else insert(graph, before, aten.add.Tensor, own, scaled)


def _branch(node: fx.Node, known: set[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node, float] | None:
    """(linear, A's, B's, scale) if a node adds a low-rank branch to a linear that nothing else reads."""
    if not is_op(node, "add"):
        return None
    for linear, scaled in (node.args[:2], node.args[1::-1]):
        if not (is_op(linear, "linear") and is_op(scaled, "mul") and is_op(scaled.args[0], "linear")):
            continue
        high, scale = scaled.args[:2]
        low = high.args[0]
        if not is_op(low, "linear") or low.args[0] is not linear.args[0] or list(linear.users) != [node]:
            continue
        tensors = {a for n in (linear, low, high) for a in n.args[1:] if a is not None}
        if isinstance(scale, (int, float)) and tensors <= known:
            return linear, low, high, float(scale)
    return None
