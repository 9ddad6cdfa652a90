"""Canonical normalisations: every spelling becomes one node, its gain and bias explicit."""

from __future__ import annotations

from typing import Any

from torch import fx

from rolora_passes.graphs.graph import aten, insert, is_op
from rolora_passes.graphs.shapes import shape_of


def normalize(gm: fx.GraphModule) -> None:
    """Rewrite spelled-out RMS norms and layer norms, and take gains and biases out of the operators."""
    for node in list(gm.graph.nodes):
        if is_op(node, "mul", "div"):
            _spelled_rms_norm(gm, node)
    for node in list(gm.graph.nodes):
        if is_op(node, "rms_norm"):
            _centred(gm, node)
    for node in list(gm.graph.nodes):
        if is_op(node, "rms_norm", "layer_norm"):
            _take_out_gain(gm, node)


def _spelled_rms_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    for x, factor in (node.args[:2], node.args[1::-1]):
        eps = _inverse_rms(factor, x, divided=is_op(node, "div"))
        shape = shape_of(x)
        if (
            eps is not None
            and shape is not None
            and node.args[0] is (x if is_op(node, "div") else node.args[0])
        ):
            new = insert(gm, node, aten.rms_norm.default, x, [shape[-1]], None, eps)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            return


def _inverse_rms(factor: object, x: object, divided: bool) -> float | None:
    """eps if `factor` is (mean(x², -1) + eps)^-½, or ^½ where it divides."""
    inside: object = None
    power = 0.5 if divided else -0.5
    if is_op(factor, "sqrt" if divided else "rsqrt") or (is_op(factor, "pow") and factor.args[1] == power):
        inside = factor.args[0]
    elif not divided and is_op(factor, "reciprocal") and is_op(factor.args[0], "sqrt"):
        inside = factor.args[0].args[0]
    if not is_op(inside, "add"):
        return None
    mean, eps = inside.args[:2]
    if not isinstance(eps, float) or not is_op(mean, "mean") or not _over_last(mean):
        return None
    return eps if _is_square(mean.args[0], x) else None


def _over_last(mean: fx.Node) -> bool:
    """Whether a mean runs over the last axis alone and keeps it."""
    rank = len(shape_of(mean.args[0]) or ())
    dims = mean.args[1] if len(mean.args) > 1 else None
    kept = (len(mean.args) > 2 and mean.args[2]) or mean.kwargs.get("keepdim", False)
    return isinstance(dims, (list, tuple)) and [d % rank for d in dims] == [rank - 1] and bool(kept)


def _is_square(node: object, x: object) -> bool:
    if is_op(node, "pow"):
        return node.args[0] is x and node.args[1] == 2
    if is_op(node, "square"):
        return node.args[0] is x
    return is_op(node, "mul") and node.args[0] is x and node.args[1] is x


def _centred(gm: fx.GraphModule, node: fx.Node) -> None:
    """rms_norm(x - mean(x)) is layer_norm(x)."""
    centred = node.args[0]
    if node.args[2] is None and is_op(centred, "sub") and is_op(centred.args[1], "mean"):
        x, mean = centred.args[:2]
        if mean.args[0] is x and _over_last(mean):
            new = insert(gm, node, aten.layer_norm.default, x, node.args[1], None, None, node.args[3])
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)


def _take_out_gain(gm: fx.GraphModule, node: Any) -> None:
    """norm(x, gain, bias) -> norm(x) * gain + bias."""
    x, sizes, *rest = node.args
    affine = rest[:1] if is_op(node, "rms_norm") else rest[:2]
    if not any(isinstance(a, fx.Node) for a in affine):
        return
    eps = rest[len(affine)] if len(rest) > len(affine) else (None if is_op(node, "rms_norm") else 1e-5)
    new = insert(gm, node, node.target, x, sizes, *[None] * len(affine), eps)
    new.meta = dict(node.meta)
    for target, value in zip((aten.mul.Tensor, aten.add.Tensor), affine, strict=False):
        if isinstance(value, fx.Node):
            new = insert(gm, node, target, new, value)
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
