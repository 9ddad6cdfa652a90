"""QuantizeWeights: round linears' weights to integers, symmetric, in groups or per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import constants, finish, site_names
from rolora_passes.graphs.quantizers import quantize_weight, require_float32
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.sites import is_head, matches, require_match
from rolora_passes.passes import Pass, Report

_GROUPS = (32, 64, 128, 256)  # what the int4 kernels take


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round-to-nearest, symmetric: s = max|w| / (2^(b-1) - 1), q = clamp(round(w / s)).

    Before:                     After (folded: q and s are parameters):
        y = linear(x, W)            q = quantize(W, s), s = choose_scale(W, group)
                                    y = linear(x, dequantize(q, s))

    Options:
        bits: 4 (-8..7) or 8 (-127..127).
        group_size: input channels that share a scale (32, 64, 128, 256); None: one scale per output
            channel. Scales of groups are rounded to bfloat16, which is what the kernels hold.
        targets: "all-linear", or patterns over site names; the head is meant too.
        head: bits of the head: 4, 8, or None to leave it. 8 is per channel.

    Raises:
        PassError: no linear matches a target, or a group size does not divide a matched linear's input.
    """

    kind: ClassVar[Literal["exact", "lossy"]] = "lossy"
    ensures: ClassVar[tuple[str, ...]] = ("weights quantized",)
    forbids: ClassVar[tuple[str, ...]] = ("weights quantized",)

    bits: int = 4
    group_size: int | None = 32
    targets: str | tuple[str, ...] = "all-linear"
    head: int | None = 4

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.head not in (4, 8, None):
            raise PassError(f"quantize-weights: bits must be 4 or 8, found {self.bits} (head {self.head})")
        if self.group_size is not None and self.group_size not in _GROUPS:
            raise PassError(
                f"quantize-weights: the int4 kernels take groups of {_GROUPS}, found {self.group_size}"
            )

    def run(self, graph: fx.GraphModule) -> Report:
        require_float32(graph, self.name)
        report = Report()
        known = constants(graph)
        shapes = infer_shapes(graph, only=known)
        names = site_names(graph)
        require_match(self.name, self.targets, names.values())
        for node, name in names.items():
            bits = self.head if is_head(node) else self.bits
            if bits is None or not matches(name, self.targets):
                report.left.append((name, "left in floating point by the options"))
                continue
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            if weight not in known:
                report.left.append((name, "its weight is quantized already"))
                continue
            group = None if bits == 8 else self.group_size
            width = int(shapes[weight].shape[-1])
            if group and width % group:
                fits = [g for g in _GROUPS if width % g == 0]
                raise PassError(
                    f"quantize-weights: groups of {group} do not divide {name}, whose input is {width}; "
                    f"use {' or '.join(map(str, fits)) or 'None (one scale per channel)'}"
                )
            node.update_arg(1, quantize_weight(graph, node, weight, bits, group, width))
            report.changed.append(
                f"{name}: {bits} bits" + (f", groups of {group}" if group else ", per channel")
            )
        finish(graph)
        return report
