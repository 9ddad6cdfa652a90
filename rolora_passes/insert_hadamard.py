"""InsertHadamard: online transforms where a rotation cannot be folded (QuaRot's and SpinQuant's R3, R4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs import hadamard
from rolora_passes.graphs.bases import Bases, infer_bases
from rolora_passes.graphs.graph import constants, finish, insert_after, is_op, op_name, root_names
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.passes import Pass, Report

# Operators that make an axis rigid element by element: what they produce can only be rotated online.
_POINTWISE = {
    "mul",
    "silu",
    "gelu",
    "relu",
    "sigmoid",
    "tanh",
    "leaky_relu",
    "elu",
    "square",
    "pow",
    "hardswish",
}


@dataclass(frozen=True)
class InsertHadamard(Pass):
    """Spread outliers at run time by Hadamards that cancel.

    Before:                                  After:
        s = attention(q, k, v, scale)            s = attention(hadamard(q, h), hadamard(k, h), v, scale)
        m = mul(silu(gate), up)                  m = hadamard(mul(silu(gate), up), f)
        y = linear(m, Wdown)                     y = linear(m, hadamard(Wdown, f))

    Options:
        r3: transform queries and keys (after rotary embedding); the two cancel in q·k. Worth its cost
            when the key cache is quantized.
        r4: transform every elementwise product or non-linearity that linears read (a down projection's
            input), and those linears' weights.
        block: transform blocks of this many channels; None: full width, K·2^m, or the largest
            constructible order that divides it.
    """

    ensures: ClassVar[tuple[str, ...]] = ("hadamards inserted",)
    forbids: ClassVar[tuple[str, ...]] = ("hadamards inserted", "weights quantized", "cache quantized")

    r3: bool = True
    r4: bool = True
    block: int | None = None

    def __post_init__(self) -> None:
        if self.block is not None and not hadamard.constructible(self.block):
            raise PassError(
                f"insert-hadamard: no Hadamard of order {self.block} is known; use a power of two"
            )

    def run(self, graph: fx.GraphModule) -> Report:
        report = Report()
        bases, shapes, known = infer_bases(graph), infer_shapes(graph), constants(graph)
        for node in list(graph.graph.nodes):
            if self.r3 and is_op(node, "attention"):
                self._queries_and_keys(graph, node, bases, int(shapes[node.args[0]].shape[-1]), report)
            elif self.r4 and _spreads(node, known) and isinstance(shapes[node], torch.Tensor):
                self._product(graph, node, int(shapes[node].shape[-1]), known, report)
        finish(graph)
        return report

    def _order(self, size: int) -> int:
        if self.block is None:
            return hadamard.largest_order(size)
        if size % self.block:
            raise PassError(f"insert-hadamard: blocks of {self.block} do not divide an axis of {size}")
        return self.block

    def _queries_and_keys(
        self, graph: fx.GraphModule, node: Any, bases: Bases, size: int, report: Report
    ) -> None:
        cls = bases.of(node.args[0])[-1][0]
        if cls.free and cls.parameters:
            report.left.append((node.name, "queries and keys are free: rotate(others=...) folds this one"))
            return
        order = self._order(size)
        for place in (0, 1):
            operand = node.args[place]
            turned = insert_after(graph, operand, torch.ops.rolora.hadamard.default, operand, order)
            node.update_arg(place, turned)
        report.changed.append(f"{node.name}: queries and keys, order {order} of {size}")

    def _product(
        self, graph: fx.GraphModule, node: fx.Node, size: int, known: set[fx.Node], report: Report
    ) -> None:
        readers = [u for u in node.users if is_op(u, "linear") and u.args[0] is node and u.args[1] in known]
        if not readers:
            if _reaches_matmul(node):
                report.left.append((node.name, "it is read by a product of two activations, not by a linear"))
            return
        order = self._order(size)
        turned = insert_after(graph, node, torch.ops.rolora.hadamard.default, node, order)
        for reader in readers:
            weight = reader.args[1]
            assert isinstance(weight, fx.Node)
            turned_weight = insert_after(graph, weight, torch.ops.rolora.hadamard.default, weight, order)
            reader.args = (turned, turned_weight, *reader.args[2:])
        names = ", ".join(root_names(r.args[1])[0] for r in readers)
        report.changed.append(f"{names}: input, order {order} of {size}")


def _spreads(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a value is made element by element: a non-linearity, or a product of two activations."""
    if node.op != "call_function" or op_name(node) not in _POINTWISE or node in known:
        return False
    return op_name(node) != "mul" or (
        len(node.all_input_nodes) == 2 and not known & set(node.all_input_nodes)
    )


def _reaches_matmul(node: fx.Node) -> bool:
    """Whether a value goes through views alone into a matrix product with something not constant."""
    views = ("unsqueeze", "view", "reshape", "flatten", "unflatten", "transpose", "squeeze")
    return any(is_op(u, "bmm", "matmul") or (is_op(u, *views) and _reaches_matmul(u)) for u in node.users)
