"""Gains and biases of norms, which ONNX's operators take and canonical graphs keep apart."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from rolora_passes.export.onnx.emitter import Emitter, Node
from rolora_passes.graphs.graph import argument, is_op


def norm_form(node: Node) -> dict[str, Any]:
    """From which axis a norm's operator goes, and its epsilon: the type's own, where torch is given none."""
    epsilon = argument(node, "eps")
    axis = -len(argument(node, "normalized_shape"))
    return {"axis": axis, "epsilon": torch.finfo(torch.float32).eps if epsilon is None else epsilon}


def norm_affine(e: Emitter, norm: Node) -> tuple[ir.Value, ir.Value]:
    """Gain and bias of a norm's operator, in the sizes it normalises: those that follow it directly, or ones
    and zeros."""
    gain, bias = _following(e, norm)
    return _affine(e, norm, gain, 1.0), _affine(e, norm, bias, 0.0)


def _affine(e: Emitter, norm: Node, found: tuple[fx.Node, Any] | None, otherwise: float) -> ir.Value:
    if found:
        return e.value(found[1])
    sizes = [int(n) for n in argument(norm, "normalized_shape")]
    if len(sizes) == 1:
        return e.numbers([otherwise] * sizes[0], torch.float32)
    key = ("affine", otherwise, tuple(sizes))
    if key not in e.shared:
        e.shared[key] = e.store.add("constant", torch.full(sizes, otherwise))
    return e.shared[key]


def folded_norm(e: Emitter, node: Node) -> Node:
    """The norm whose operator multiplies or adds what a node would; None if there is none."""
    near = [*node.all_input_nodes, *(a for n in node.all_input_nodes for a in n.all_input_nodes)]
    for norm in near:
        if is_op(norm, "rms_norm", "layer_norm") and any(f and f[0] is node for f in _following(e, norm)):
            return norm
    return None


def _following(e: Emitter, norm: Node) -> tuple[tuple[fx.Node, Any] | None, tuple[fx.Node, Any] | None]:
    """The multiplication by a gain and the addition of a bias behind a norm."""
    axes = len(argument(norm, "normalized_shape"))
    gain = _follower(e, norm, "mul", axes)
    bias = _follower(e, gain[0], "add", axes) if gain and is_op(norm, "layer_norm") else None
    return gain, bias


def _follower(e: Emitter, node: Node, kind: str, axes: int) -> tuple[fx.Node, Any] | None:
    """The only reader of a value, and what it multiplies or adds along the last axes."""
    readers = list(node.users)
    if len(readers) != 1 or not is_op(readers[0], kind) or (node in e.narrowed) != (readers[0] in e.narrowed):
        return None
    others = [a for a in readers[0].args[:2] if a is not node]
    if len(others) == 1 and others[0] in e.constants and e.shape(others[0]) == e.shape(node)[-axes:]:
        return readers[0], others[0]
    return None
