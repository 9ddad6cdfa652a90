"""Canonical normalisations: every spelling becomes one node, its gain and bias explicit.

Casts between floating-point types are looked through, as some models spell only a part of a norm in float32;
`graphs.casts` then takes away what is left of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rolora_passes.graphs.capture.casts import bare, cast_to
from rolora_passes.graphs.graph import argument, aten, insert, is_op
from rolora_passes.graphs.shapes import shape_of


def normalize(gm: fx.GraphModule) -> None:
    """Rewrite spelled-out RMS norms and layer norms, and take gains and biases out of the operators."""
    for node in list(gm.graph.nodes):
        if is_op(node, "mul", "div"):
            _spelled_rms_norm(gm, node)
    for node in list(gm.graph.nodes):
        if is_op(node, "rms_norm", "layer_norm"):
            _take_out_affine(gm, node)
    for node in list(gm.graph.nodes):
        if is_op(node, "rms_norm") and node.users:
            _centred(gm, node)


def _spelled_rms_norm(gm: fx.GraphModule, node: Any) -> None:
    divided = is_op(node, "div")
    for x, factor in (node.args[:2], node.args[1::-1]):
        eps = _inverse_rms(bare(factor), x, divided)
        shape, value = shape_of(x), node.meta["val"]
        if eps is not None and shape is not None and (x is node.args[0] or not divided):
            x = cast_to(gm, node, x, value.dtype)  # x of half precision, times a factor in float32
            new = insert(gm, node, aten.rms_norm.default, x, [shape[-1]], None, eps)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            return


def _inverse_rms(factor: object, x: object, divided: bool) -> float | None:
    """eps if `factor` is (mean(x², -1) + eps)^-½, or ^½ where it divides."""
    inside: object = None
    power = 0.5 if divided else -0.5
    if is_op(factor, "sqrt" if divided else "rsqrt") or (is_op(factor, "pow") and factor.args[1] == power):
        inside = bare(factor.args[0])
    elif not divided and is_op(factor, "reciprocal") and is_op(bare(factor.args[0]), "sqrt"):
        inside = bare(bare(factor.args[0]).args[0])
    if not is_op(inside, "add"):
        return None
    mean, eps = bare(inside.args[0]), inside.args[1]
    if not isinstance(eps, float) or not is_op(mean, "mean") or not _over_last(mean):
        return None
    return eps if _is_square(bare(mean.args[0]), bare(x)) else None


def _over_last(mean: fx.Node) -> bool:
    """Whether a mean runs over the last axis alone and keeps it."""
    rank = len(shape_of(mean.args[0]) or ())
    dims = mean.args[1] if len(mean.args) > 1 else None
    kept = (len(mean.args) > 2 and mean.args[2]) or mean.kwargs.get("keepdim", False)
    return isinstance(dims, (list, tuple)) and [d % rank for d in dims] == [rank - 1] and bool(kept)


def _is_square(node: object, x: object) -> bool:
    if is_op(node, "pow"):
        return bare(node.args[0]) is x and node.args[1] == 2
    if is_op(node, "square"):
        return bare(node.args[0]) is x
    return is_op(node, "mul") and all(bare(a) is x for a in node.args)


def _centred(gm: fx.GraphModule, node: Any) -> None:
    """rms_norm(x - mean(x)) is layer_norm(x)."""
    centred = bare(node.args[0])
    if not is_op(centred, "sub") or not is_op(bare(centred.args[1]), "mean"):
        return
    x, mean = centred.args[0], bare(centred.args[1])
    if bare(mean.args[0]) is bare(x) and _over_last(mean) and len(node.args[1]) == 1:
        new = insert(gm, node, aten.layer_norm.default, x, node.args[1], None, None, node.args[3])
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)


def _take_out_affine(gm: fx.GraphModule, node: Any) -> None:
    """norm(x, gain, bias) -> norm(x) * gain + bias, with every argument written, eps as a number."""
    x, sizes, *_ = node.args
    affine = [argument(node, name) for name in ("weight", "bias")[: 1 if is_op(node, "rms_norm") else 2]]
    eps = argument(node, "eps")
    if eps is None:  # what the operator takes: that of the type it computes in, float32 for half precision
        eps = torch.finfo(torch.promote_types(x.meta["val"].dtype, torch.float32)).eps
    new = insert(gm, node, node.target, x, sizes, *[None] * len(affine), eps)
    new.meta = dict(node.meta)
    for target, value in zip((aten.mul.Tensor, aten.add.Tensor), affine, strict=False):
        if isinstance(value, fx.Node):
            new = insert(gm, node, target, new, value)
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
