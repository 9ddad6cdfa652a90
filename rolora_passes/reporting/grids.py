"""Values and the grids that they are rounded to: a few groups of every quantizer, including the worst."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.debugging.pairing import layers_of, sites_of
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import KEPT, argument, get_tensor, is_op, linears
from rolora_passes.graphs.running import values
from rolora_passes.numerics.affine import limits, qparams
from rolora_passes.reporting.activations import activation_sites
from rolora_passes.reporting.arrays import Arrays

_BINS = 48
_FAKE = ("fake_quantize", "fake_quantize_static")
_VIEWS = ("unflatten", "flatten", "view", "reshape")


def weight_grids(graph: fx.GraphModule, twin: fx.GraphModule, arrays: Arrays) -> list[dict[str, Any]]:
    """For every quantized linear, three groups: the weights before rounding, and their grid."""
    names = sites_of(graph)
    layers, twin_names = layers_of(graph, names), sites_of(twin)
    originals = {twin_names[linear.name]: linear.args[1] for linear in linears(twin)}
    found = []
    for linear in linears(graph):
        name, quantized = names[linear.name], linear.args[1]
        if is_op(quantized, *KEPT) and name in originals:
            (before,), (after, scale) = (
                compute(twin, [originals[name]]),  # type: ignore[list-item]
                compute(graph, [quantized, quantized.args[1]]),
            )
            groups = scale.shape[-1]
            samples = []
            for label, index, (x, y) in _chosen(*(w.reshape(scale.numel(), -1) for w in (before, after))):
                grid = _weight_grid(graph, quantized, scale.flatten()[index], index)
                where = f"row {index // groups}" + (f", group {index % groups}" if groups > 1 else "")
                samples.append({"label": label, "where": where, **_histogram(x, y, grid, arrays)})
            about = {"bits": argument(quantized, "bits"), "group": before.shape[-1] // groups}
            found.append({"name": name, "layer": layers.get(linear), **about, "samples": samples})
    return found


def _weight_grid(graph: fx.GraphModule, quantized: fx.Node, scale: Tensor, index: int) -> Tensor:
    """The values that a group of a weight can take, ascending."""
    third = argument(quantized, "table" if is_op(quantized, "decode") else "zero")
    other: Any = None if third is None else compute(graph, [third])[0]
    if is_op(quantized, "decode"):
        table: Tensor = other
        return scale * table
    zero = None if other is None else other.flatten()[index]
    return _levels(scale, zero, argument(quantized, "bits"))


def _levels(scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    first, last = limits(bits, zero is None)
    integers = torch.arange(first, last + 1, dtype=torch.float32, device=scale.device)
    levels: Tensor = scale.float() * (integers - (0 if zero is None else zero.float()))
    return levels


def activation_grids(graph: fx.GraphModule, tokens: Tensor, arrays: Arrays) -> list[dict[str, Any]]:
    """For every quantizer of activations, three groups from one run on tokens int64 [1, S].

    The values are those of the quantized graph, so earlier quantizers have rounded them too.
    """
    sites, found = _quantizers(graph), []
    read = {quantizer.args[0]: quantizer for quantizer in sites}
    before: dict[fx.Node, Tensor] = {}
    for node, value in values(graph, tokens):
        if node in read:
            before[read[node]] = value  # kept until the quantizer has run
        if node in sites:
            about = {**sites[node], "bits": argument(node, "bits")}
            pair = before.pop(node), value
            if value.numel():  # an expert may get no tokens
                found.append({**about, **_sampled(graph, node, pair, tokens.shape[1], arrays)})
    return found


def _quantizers(graph: fx.GraphModule) -> dict[fx.Node, dict[str, Any]]:
    """Every quantizer of an activation, with a description."""
    layers = layers_of(graph, sites_of(graph))
    found: dict[fx.Node, dict[str, Any]] = {}
    for node, site in activation_sites(graph).items():
        if is_op(node, *_FAKE):
            found[node] = {"name": site.kind, "layer": site.layer}
    for attention in graph.graph.nodes:
        for place, name in ((1, "keys"), (2, "values")) if is_op(attention, "attention") else ():
            node = attention.args[place]
            while is_op(node, *_VIEWS):
                node = node.args[0]
            if is_op(node, *_FAKE):
                found[node] = {"name": name, "layer": layers.get(attention)}
    return found


def _sampled(
    graph: fx.GraphModule, node: fx.Node, pair: tuple[Tensor, Tensor], tokens: int, arrays: Arrays
) -> dict[str, Any]:
    size = argument(node, "group_size") or pair[0].shape[-1]
    x, y = (value.reshape(-1, size) for value in pair)
    parts, others = divmod(len(x), tokens)
    samples = []
    for label, index, (xs, ys) in _chosen(x, y):
        if others:  # experts read only some of the tokens
            where = f"row {index}"
        else:
            token, part = divmod(index, parts)
            where = f"token {token}" + (f", part {part} of {parts}" if parts > 1 else "")
        samples.append({"label": label, "where": where, **_histogram(xs, ys, _grid(graph, node, xs), arrays)})
    return {"group": size, "samples": samples}


def _grid(graph: fx.GraphModule, node: fx.Node, x: Tensor) -> Tensor:
    """The values that a group x of an activation can take, ascending."""
    bits, symmetric = argument(node, "bits"), argument(node, "symmetric")
    if is_op(node, "fake_quantize_static"):
        scale, zero = (get_tensor(graph, str(argument(node, part).target)) for part in ("scale", "zero"))
    else:
        low, high = (
            bound * argument(node, "clip") for bound in (x.amin().clamp_max(0), x.amax().clamp_min(0))
        )
        scale, zero = qparams(low, high, bits, symmetric)
    return _levels(scale.flatten(), None if symmetric else zero.flatten(), bits)


def _chosen(x: Tensor, y: Tensor) -> list[tuple[str, int, tuple[Tensor, Tensor]]]:
    """Of groups [n, size] before and after rounding: those with the largest, median and smallest loss."""
    lost = (x - y).float().square().sum(-1) / x.float().square().sum(-1).clamp_min(1e-30)
    order = lost.argsort(descending=True)
    places = {"worst": 0, "median": len(order) // 2, "best": len(order) - 1}
    return [(label, i := int(order[place]), (x[i], y[i])) for label, place in places.items()]


def _histogram(x: Tensor, y: Tensor, levels: Tensor, arrays: Arrays) -> dict[str, Any]:
    """A histogram of the values, with the grid and the relative error of rounding."""
    x, y, levels = x.detach().float(), y.detach().float(), levels.to(x.device)
    low, high = float(torch.minimum(x.min(), levels[0])), float(torch.maximum(x.max(), levels[-1]))
    high = high if high > low else low + 1.0
    counts = torch.histc(x, _BINS, low, high)
    return {
        "low": low,
        "high": high,
        "counts": arrays.linear(counts, float(counts.max())),
        "levels": _compact(levels),
        "error": float((x - y).norm() / x.norm().clamp_min(1e-30)),
        "used": int(torch.unique(y).numel()),
    }


def _compact(levels: Tensor) -> dict[str, Any] | list[float]:
    """A uniform grid as its ends and number of levels, any other as its levels."""
    steps = levels.diff()
    if bool((steps - steps[0]).abs().max() < 1e-3 * steps[0]):
        return {"first": float(levels[0]), "last": float(levels[-1]), "count": len(levels)}
    return [float(level) for level in levels]
