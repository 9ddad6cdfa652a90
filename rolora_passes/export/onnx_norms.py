"""Gains and biases of norms, which ONNX's operators take and canonical graphs keep apart."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from rolora_passes.export.onnx_emitter import Emitter, Node
from rolora_passes.graphs.graph import is_op


def norm_affine(e: Emitter, norm: Node) -> tuple[ir.Value, ir.Value]:
    """Gain and bias [d] for a norm's operator: those that follow it directly, or ones and zeros."""
    gain, bias = _following(e, norm)
    width = int(e.shape(norm)[-1])
    ones, zeros = (e.numbers([n] * width, torch.float32) for n in (1.0, 0.0))
    return (e.value(gain[1]) if gain else ones), (e.value(bias[1]) if bias else zeros)


def folded_norm(e: Emitter, node: Node) -> Node:
    """The norm whose operator multiplies or adds what a node would; None if there is none."""
    near = [*node.all_input_nodes, *(a for n in node.all_input_nodes for a in n.all_input_nodes)]
    for norm in near:
        if is_op(norm, "rms_norm", "layer_norm") and any(f and f[0] is node for f in _following(e, norm)):
            return norm
    return None


def _following(e: Emitter, norm: Node) -> tuple[tuple[fx.Node, Any] | None, tuple[fx.Node, Any] | None]:
    """The multiplication by a gain and the addition of a bias behind a norm."""
    gain = _follower(e, norm, "mul")
    bias = _follower(e, gain[0], "add") if gain and is_op(norm, "layer_norm") else None
    return gain, bias


def _follower(e: Emitter, node: Node, kind: str) -> tuple[fx.Node, Any] | None:
    """The only reader of a value, and what it multiplies or adds along the last axis."""
    readers = list(node.users)
    if len(readers) != 1 or not is_op(readers[0], kind) or (node in e.narrowed) != (readers[0] in e.narrowed):
        return None
    others = [a for a in readers[0].args[:2] if a is not node]
    if len(others) == 1 and others[0] in e.constants and e.shape(others[0]) == e.shape(node)[-1:]:
        return readers[0], others[0]
    return None
