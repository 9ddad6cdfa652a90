"""MergeLoRA: fold low-rank branches into the weights they stand beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from rolora_passes.adapters.lora import Branch, find_branches
from rolora_passes.graphs.axis_maps import CHANGED
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import (
    KEPT,
    add_parameter,
    argument,
    aten,
    finish,
    insert,
    is_op,
    root_names,
    site_names,
)
from rolora_passes.graphs.lineage import keep_ways, ways
from rolora_passes.numerics.affine import Integers
from rolora_passes.passes.base import Kind, Pass, Report
from rolora_passes.quantize.quantizers import encode_weight, quantize_weight


@dataclass(frozen=True)
class MergeLoRA(Pass):
    """Replace every low-rank branch by an expression on the weight.

    Before:                                               After:
        y' = linear(x, W, b)                                  y = linear(x, W + (B @ A) * s, b)
        y = y' + linear(linear(x, A), B) * s

    Branches are found by structure, so it does not matter what made them, nor in which basis they are, nor
    whether they are stored on a grid.

    Options:
        requantize: merge into quantized weights too, and round the sum to a grid of the same kind, whose
            scales are chosen anew; otherwise branches beside quantized weights are kept. It is what QLoRA's
            users do to have one weight, and it loses part of what the branch gave.
    """

    name: ClassVar[str] = "merge-lora"
    forbids: ClassVar[tuple[str, ...]] = ("activations quantized",)

    requantize: bool = False

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """Exact, unless it rounds."""
        return "lossy" if self.requantize else "exact"

    def run(self, graph: fx.GraphModule) -> Report:
        report, names = Report(), site_names(graph)
        traced, merged = ways(graph), dict[fx.Node, fx.Node]()
        for branch in find_branches(graph):
            linear = merged.get(branch.linear, branch.linear)
            reason = self._kept(linear.args[1])
            if reason:
                report.left.append((names[branch.linear], reason))
                continue
            merged[branch.linear] = _merge(graph, linear, branch)
            report.changed.append(names[branch.linear])
        finish(graph)
        rounded = {old: new for old, new in merged.items() if is_op(new.args[1], *KEPT)}
        keep_ways(graph, {new: traced[old].then(CHANGED) for old, new in rounded.items()})
        return report

    def _kept(self, weight: Any) -> str | None:
        """Why a branch stays beside a weight, if it does."""
        if not is_op(weight, *KEPT):
            return None
        if not self.requantize:
            return "its weight is quantized: requantize merges the two"
        folded = weight.args[0].op == "get_attr"
        return None if folded else "its quantizer is not folded yet: run fold-constants first"


def _merge(graph: fx.GraphModule, linear: fx.Node, branch: Branch) -> fx.Node:
    """One linear in place of a linear and its branch."""
    node = branch.total
    a, b = (_constant(graph, half.args[1]) for half in (branch.low, branch.high))
    product = insert(graph, node, aten.matmul.default, b, a)
    scaled = insert(graph, node, aten.mul.Tensor, product, branch.scale)
    if is_op(linear.args[1], *KEPT):
        weight = _requantized(graph, node, linear.args[1], scaled)
    else:
        weight = insert(graph, node, aten.add.Tensor, linear.args[1], scaled)
    bias = _merged_bias(graph, linear, branch, b)
    tensors = (weight,) if bias is None else (weight, bias)
    whole = insert(graph, node, aten.linear.default, linear.args[0], *tensors)
    node.replace_all_uses_with(whole)
    return whole


def _constant(graph: fx.GraphModule, weight: Any) -> Any:
    """A half of a branch as a constant expression: of one on a grid, its values there.

    The sum of a weight and what is dequantized as the graph runs would be no weight that a pass can see.
    """
    if not is_op(weight, *KEPT):
        return weight
    (value,) = compute(graph, [weight], dtype=torch.float64)
    return add_parameter(graph, root_names(weight)[0].removesuffix("_q"), value.to(dtype_of(graph)))


def _requantized(graph: fx.GraphModule, before: fx.Node, old: Any, added: fx.Node) -> fx.Node:
    """The sum of a stored weight and a matrix, on a grid, or in a codebook, like the weight's."""
    exact, more, scale = compute(graph, [old, added, old.args[1]], dtype=torch.float64)
    group = None if scale.shape[-1] == 1 else exact.shape[-1] // scale.shape[-1]
    name = root_names(old)[0].removesuffix("_q")
    weight = add_parameter(graph, name, (exact + more).to(dtype_of(graph)))
    bits = argument(old, "bits")
    if is_op(old, "decode"):
        return encode_weight(graph, before, weight, old.args[2], bits, group)
    symmetric = argument(old, "zero") is None
    return quantize_weight(graph, before, weight, Integers(bits, group, symmetric))


def _merged_bias(graph: fx.GraphModule, linear: fx.Node, branch: Branch, high: Any) -> fx.Node | None:
    """b + s·(B·a + b'), B: high, where the halves have biases a and b' (fuse-norm gives them some)."""
    own: fx.Node | None
    before = branch.total
    own, inner, outer = (argument(n, "bias") for n in (linear, branch.low, branch.high))
    pushed = outer if inner is None else insert(graph, before, aten.linear.default, inner, high, outer)
    if pushed is None:
        return own
    scaled = insert(graph, before, aten.mul.Tensor, pushed, branch.scale)
    return scaled if own is None else insert(graph, before, aten.add.Tensor, own, scaled)
