"""QuantizeActivations: what linears read, on a grid of 3 to 8 bits chosen per token at run time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import (
    KEPT,
    add_parameter,
    finish,
    get_tensor,
    insert_after,
    is_op,
    site_names,
)
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.sites import by_name_only, is_head, require_match, why_left
from rolora_passes.numerics.affine import qparams
from rolora_passes.passes.base import Calibration, Kind, Pass, Report
from rolora_passes.quantize.clips import Rounded, search_clips
from rolora_passes.quantize.quantizers import require_bits, require_float32, require_group

_FAKE = ("fake_quantize", "fake_quantize_static")


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Quantize and dequantize what linears read.

    Before:                              After:
        y = linear(x, dequantize(q, s))      y = linear(fake_quantize(x, 8), dequantize(q, s))

    Linears that read one value share its quantizer. A value that is quantized already is left, so two of
    these passes make a model of mixed precision: the first takes its targets, the second the rest.
    Observers on quantized values are removed.

    Options:
        bits (bits): width of the integers, 3 to 8.
        group_size (channels): channels that share a scale; None: one scale per token.
        symmetric: a grid around zero, from max|x|; otherwise from [min(x, 0), max(x, 0)], with a zero point.
        clip: multiplies the range that a token shows (QuaRot: 0.9 at 4 bits).
        clip_search: choose it for every value, by what rounding does to the linears that read it; needs
            calibration. Clips cost nothing at run time.
        static: one grid for all tokens, from what observe-activations saw, instead of one chosen at run time.
        targets: "all-linear", or patterns over site names; the head is meant too. A mixture's routers, and
            gates with one output, read the unrounded value unless a pattern names them.
        exclude: patterns of sites to leave.
        head (bits): width of the head's input, or None to leave it.
        float_weights: also what linears with floating-point weights read.

    Raises:
        PassError: no linear matches a target, a group size does not divide an input, or `static` with a
            value that was not observed.
    """

    kind: ClassVar[Kind] = "lossy"
    ensures: ClassVar[tuple[str, ...]] = ("activations quantized",)

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = False
    clip: float = 1.0
    clip_search: bool = False
    static: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    head: int | None = 8
    float_weights: bool = False

    def __post_init__(self) -> None:
        require_bits(self.name, "bits", self.bits, low=3)
        require_bits(self.name, "head", self.head, low=3)
        if not 0 < self.clip <= 1:
            raise PassError(f"{self.name}: clip must be above 0 and at most 1, found {self.clip}")
        if self.group_size is not None and (self.group_size < 2 or self.static):
            found = f"{self.group_size}" + (" with static, which has one scale" if self.static else "")
            raise PassError(f"{self.name}: group_size must be 2 or more or None, found {found}")
        if self.clip_search and (self.static or self.clip != 1):
            raise PassError(
                f"{self.name}: clip_search chooses the clip of dynamic grids: leave clip and static"
            )

    @property
    def needs_calibration(self) -> bool:
        return self.clip_search

    def run(self, graph: fx.GraphModule) -> Report:
        return self._quantize(graph, {})

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        sites: dict[fx.Node, Rounded] = {}
        for node, value, bits, _ in self._sites(graph, Report()):
            known = Rounded(bits, self.group_size, self.symmetric, [])
            sites.setdefault(value, known).weights.append(cast(fx.Node, node.args[1]))
        progress = partial(calibration.on_progress, self.name)
        clips = search_clips(graph, sites, calibration.tokens, progress)
        report = self._quantize(graph, clips)
        report.notes["clips"] = {value.name: clip for value, clip in clips.items()}
        return report

    def _quantize(self, graph: fx.GraphModule, clips: Mapping[fx.Node, float]) -> Report:
        report = Report()
        quantized: dict[fx.Node, fx.Node] = {}
        for node, value, bits, name in list(self._sites(graph, report)):
            if value not in quantized:
                quantized[value] = self._quantizer(graph, value, bits, name, clips.get(value, self.clip))
            node.update_arg(0, quantized[value])
            report.changed.append(f"{name}: {bits} bits")
        finish(graph)
        return report

    def _sites(self, graph: fx.GraphModule, report: Report) -> Iterator[tuple[fx.Node, fx.Node, int, str]]:
        """Each linear to quantize, what it reads, its bits and its name; the others go to the report."""
        require_float32(graph, self.name)
        shapes, names = infer_shapes(graph), site_names(graph)
        require_match(self.name, self.targets, names.values())
        special = by_name_only(graph, shapes)
        for node, name in names.items():
            bits = self.head if is_head(node) else self.bits
            value = node.args[0]
            assert isinstance(value, fx.Node)
            left = why_left(node, name, self.targets, self.exclude, special)
            if bits is None or left:
                report.left.append((name, left or "left in floating point by the options"))
            elif is_op(value, *_FAKE):
                report.left.append((name, "its input is quantized already"))
            elif not self.float_weights and not is_op(node.args[1], *KEPT):
                report.left.append((name, "its weight is in floating point"))
            else:
                require_group(self.name, name, int(shapes[value].shape[-1]), self.group_size)
                yield node, value, bits, name

    def _quantizer(self, graph: fx.GraphModule, value: fx.Node, bits: int, name: str, clip: float) -> fx.Node:
        seen = value if is_op(value, "observed") else None
        source = seen.args[0] if seen is not None else value
        ops = torch.ops.rolora
        if not self.static:
            known = (source, bits, self.group_size, self.symmetric, clip)
            return insert_after(graph, value, ops.fake_quantize.default, *known)
        if seen is None:
            raise PassError(
                f"{self.name}: static needs to know the range of what {name} reads: "
                "run observe-activations on it first"
            )
        low, high = (get_tensor(graph, str(node.target)) for node in seen.args[1:3])
        range_ = low.amin().clamp_max(0) * clip, high.amax().clamp_min(0) * clip
        chosen = qparams(*range_, bits, self.symmetric)
        scale, zero = (
            add_parameter(graph, f"{name}.input_{part}", tensor.reshape(1))
            for part, tensor in zip(("scale", "zero"), chosen, strict=True)
        )
        grid = (scale, zero, bits, self.symmetric)
        return insert_after(graph, value, ops.fake_quantize_static.default, source, *grid)
