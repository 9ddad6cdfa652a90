"""Norms, with the gains and biases that ONNX's operators take and canonical graphs keep apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from rolora_passes.export.onnx.emitter import Lowering, Match, OnnxEmitter
from rolora_passes.export.onnx.prepared import Node, Prepared
from rolora_passes.graphs.graph import argument, is_op, op_name


def norm_form(node: Node) -> dict[str, Any]:
    """From which axis a norm's operator goes, and its epsilon: the type's own, where torch is given none."""
    epsilon = argument(node, "eps")
    axis = -len(argument(node, "normalized_shape"))
    return {"axis": axis, "epsilon": torch.finfo(torch.float32).eps if epsilon is None else epsilon}


def norm_pattern(graph: Prepared, node: Node, lowerings: Mapping[str, Lowering]) -> Match | None:
    """A norm with the gain and the bias that follow it: norm(x), norm(x) * g, norm(x) * g + b."""
    norm = norm_giving(graph, node)
    if norm is None:
        return None
    return Match(norm, (node,), (norm.args[0],), lambda e: [lowerings[op_name(norm)](e, norm)])


def norm_giving(graph: Prepared, node: Node) -> Node | None:
    """The norm whose operator gives a node's value: itself, or one that the node multiplies or adds to."""
    near = [node, *node.all_input_nodes, *(a for n in node.all_input_nodes for a in n.all_input_nodes)]
    for norm in near:
        if is_op(norm, "rms_norm", "layer_norm"):
            followers = [found[0] for found in _following(graph, norm) if found is not None]
            if node in (norm, *followers):
                return norm
    return None


def norm_affine(e: OnnxEmitter, norm: Node) -> tuple[ir.Value, ir.Value]:
    """Gain and bias of a norm's operator, in the sizes it normalises: those that follow it directly, or ones
    and zeros."""
    gain, bias = _following(e.graph, norm)
    return _affine(e, norm, gain, 1.0), _affine(e, norm, bias, 0.0)


def _affine(e: OnnxEmitter, norm: Node, found: tuple[fx.Node, Any] | None, otherwise: float) -> ir.Value:
    if found:
        return e.value(found[1])
    sizes = [int(n) for n in argument(norm, "normalized_shape")]
    if len(sizes) == 1:
        return e.numbers([otherwise] * sizes[0], torch.float32)
    key = ("affine", otherwise, tuple(sizes))
    if key not in e.shared:
        e.shared[key] = e.store.add("constant", torch.full(sizes, otherwise))
    return e.shared[key]


def _following(graph: Prepared, norm: Node) -> tuple[tuple[fx.Node, Any] | None, tuple[fx.Node, Any] | None]:
    """The multiplication by a gain and the addition of a bias behind a norm."""
    axes = len(argument(norm, "normalized_shape"))
    gain = _follower(graph, norm, "mul", axes)
    bias = _follower(graph, gain[0], "add", axes) if gain and is_op(norm, "layer_norm") else None
    return gain, bias


def _follower(graph: Prepared, node: Node, kind: str, axes: int) -> tuple[fx.Node, Any] | None:
    """The only reader of a value, and what it multiplies or adds along the last axes."""
    readers, narrowed = list(node.users), graph.narrowed
    if len(readers) != 1 or not is_op(readers[0], kind) or (node in narrowed) != (readers[0] in narrowed):
        return None
    others = [a for a in readers[0].args[:2] if a is not node]
    if (
        len(others) == 1
        and others[0] in graph.constants
        and graph.shape(others[0]) == graph.shape(node)[-axes:]
    ):
        return readers[0], others[0]
    return None
