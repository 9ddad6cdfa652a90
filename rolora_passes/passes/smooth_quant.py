"""SmoothQuant: move what is hard to quantize in activations into the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.bases.scalings import Reading, Scaling, apply_scaling, find_scalings, largest
from rolora_passes.graphs.expressions import Expressions
from rolora_passes.graphs.facts import refuted
from rolora_passes.graphs.graph import add_parameter, constants, finish, is_op, parameter_names, site_names
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.sites import matches, require_match
from rolora_passes.numerics.exact import exact
from rolora_passes.passes.base import Pass, Report
from rolora_passes.quantize.observers import observations, remove_observers

_Seen = dict[fx.Node, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide what linears read by s and multiply their weights by s, so that both quantize well.

    Before:                                     After:
        n = mul(rms_norm(x, [d]), gain)             n = mul(rms_norm(x, [d]), div(gain, s))
        y = linear(observed(n, low, high), W)       y = linear(n, mul(W, s))

    For every channel j, s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) (Xiao et al., 2023, eq. 4); x as
    observed, W all the weights that read x. Where heads share a channel's s, maxima are over the heads. s_j
    is 1 for channels that are always zero on either side.

    1/s goes wherever `find_scalings` finds that it keeps the function: a norm's gain and bias, the linear
    before a relu or beside a gate, the values before attention. All s are those of the graph as given, so
    sites do not depend on each other's order. Observers are removed: what they saw is not so any more.
    A norm must keep its gain to hold 1/s: fuse-norm before this leaves nothing to hold it, and fuse-norm
    after this multiplies it into W·s again, which undoes the scaling of what norms write.

    Options:
        alpha: from 0 (all difficulty stays in the activations) to 1 (it all moves to the weights).
        targets: "all-linear", or patterns over site names; linears that read one value are smoothed
            together if any of them is meant.

    Raises:
        PassError: targets that match no linear, or one of theirs that was observed per tensor.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonical", "activations observed")
    forbids: ClassVar[tuple[str, ...]] = ("weights quantized",)
    removes: ClassVar[tuple[str, ...]] = ("activations observed",)

    alpha: float = 0.5
    targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PassError(f"{self.name}: alpha must be from 0 to 1, found {self.alpha}")

    def run(self, graph: fx.GraphModule) -> Report:
        report, seen = Report(), observations(graph)
        names = site_names(graph)
        require_match(self.name, self.targets, names.values())
        report.changed += [f"{remove_observers(graph)} observers removed"] if seen else []
        scalings = [(s, [names[n] for n in s.linears]) for s in find_scalings(graph)]
        chosen: list[tuple[Scaling, str, Tensor]] = []
        for scaling, linears in scalings:
            site = ", ".join(linears)
            reason = self._left(graph, scaling, linears, seen)
            if reason:
                report.left.append((site, reason))
            else:
                chosen.append((scaling, site, self._scale(graph, scaling, site, seen)))
        expressions = Expressions(graph)
        for scaling, site, scale in chosen:
            first = names[scaling.linears[0]]
            stem = f"{first}_smoothing" if first in parameter_names(graph) else f"{first}.smoothing"
            apply_scaling(graph, expressions, scaling, add_parameter(graph, stem, scale))
            report.changed.append(f"{site}: by {float(scale.min()):.3g} to {float(scale.max()):.3g}")
            report.moved |= scaling.moved
        finish(graph)
        return report

    def _left(self, graph: fx.GraphModule, scaling: Scaling, linears: list[str], seen: _Seen) -> str | None:
        """Why a site is left as it is, if it is."""
        if not any(matches(name, self.targets) for name in linears):
            return "not smoothed by the options"
        if scaling.reason:
            bare = any(is_op(r.value, "rms_norm", "layer_norm") for r in scaling.inputs)
            fused = bare and refuted(graph, "norms fused") is None
            hint = "; no gain is left to take the scale: run smooth-quant before fuse-norm"
            return scaling.reason + (hint if fused else "")
        if any(reading.value not in seen for reading in scaling.inputs):
            return "its input was not observed: run observe-activations with targets that include it"
        return None

    def _scale(self, graph: fx.GraphModule, scaling: Scaling, site: str, seen: _Seen) -> Tensor:
        """s [n], in the narrowest type among the parameters it goes into, whose types then stay."""
        ranges = [_magnitude(r, *seen[r.value], scaling.size) for r in scaling.inputs]
        if any(r is None for r in ranges):
            raise PassError(
                f"{self.name}: expected the input of {site} to be observed per channel, found one range for "
                "all: run observe-activations with per: channel first"
            )
        inputs = torch.stack([r for r in ranges if r is not None]).amax(0)
        weights = torch.stack([largest(graph, axis) for axis in scaling.weights]).amax(0).to(inputs.device)
        shapes = infer_shapes(graph, only=constants(graph))
        types = {shapes[axis.node].dtype for axis in (*scaling.divide, *scaling.multiply)}
        narrow = min(types, key=lambda dtype: torch.finfo(dtype).bits)
        scale = (inputs**self.alpha / weights ** (1 - self.alpha)).to(narrow)
        usable = (inputs > 0) & (weights > 0) & (scale > 0) & scale.isfinite()
        return torch.where(usable, scale, torch.ones_like(scale))


def _magnitude(reading: Reading, low: Tensor, high: Tensor, size: int) -> Tensor | None:
    """The greatest magnitude of every channel, over the heads that share it: float64 [size]."""
    if low.numel() != reading.outer * size * reading.inner:
        return None
    both = exact(torch.maximum(low.abs(), high.abs()))
    return both.reshape(reading.outer, size, reading.inner).amax((0, 2))
