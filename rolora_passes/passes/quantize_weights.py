"""QuantizeWeights: linears' weights on a grid (integers, NormalFloat), rounded to nearest or by GPTQ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from torch import fx

from rolora_passes.adapters.lora import unnamed_branches
from rolora_passes.errors import PassError
from rolora_passes.graphs.accounting import remaining
from rolora_passes.graphs.graph import constants, finish, site_names
from rolora_passes.graphs.lineage import keep_ways, ways
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.sites import by_name_only, is_head, require_match, why_left
from rolora_passes.numerics.affine import Integers
from rolora_passes.numerics.grids import Grid, make_grid
from rolora_passes.passes.base import Calibration, Kind, Pass, Report, renamed
from rolora_passes.quantize.gptq_linears import gptq_linears
from rolora_passes.quantize.quantizers import (
    quantize_weight,
    require_bits,
    require_float32,
    require_group,
    store_quantized,
)

_METHODS = ("rtn", "gptq")
_OLD = ("nf", "uniform")  # grids, which were methods in 0.1


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Put weights on a grid: s = max|w| / (2^(b-1) - 1), q = clamp(round(w / s)), or another of the options.

    Before:                     After (folded: q and s are parameters):
        y = linear(x, W)            s, z = choose_qparams(W, group); q = quantize(W, s, z)
                                    y = linear(x, dequantize(q, s))

    A weight that is quantized already is left, so two of these passes make a model of mixed precision:
    the first takes its targets, the second the rest. The report has every matrix of the graph, also those
    that no linear reads (tables, experts, convolutions), and the number of vectors, which stay as they are.

    Options:
        bits (bits): width of the integers, 2 to 8.
        group_size (channels): input channels that share a scale; None: one per output channel; "auto": 32,
            and one per output channel at 8 bits. A head of 8 bits beside weights of fewer has one per output
            channel, too. Scales of groups are rounded to bfloat16, which is what kernels hold.
        symmetric: -2^(b-1) .. 2^(b-1)-1 around zero (8 bits: -127 .. 127); otherwise with a zero point.
        method: how to round: "rtn" (to nearest) or "gptq" (Frantar et al., 2023; needs calibration, and sees
            what the graph computes with everything before already quantized).
        grid: onto what: "int", or a codebook scaled by each group's largest magnitude: "nf" (NormalFloat,
            QLoRA), "uniform" (LoftQ's table), or one that another package registers. GPTQ rounds onto "int".
        clip_search: shrink each range to where sum |w - ŵ|^2.4 is least, over a grid of 80.
        targets: "all-linear", or patterns over site names; the head is meant too. A mixture's routers,
            gates with one output, and low-rank branches ("lora_A", "lora_B") stay in floating point unless
            a pattern names them.
        exclude: patterns of sites to leave.
        head (bits): width of the head, or None to leave it.
        damping: GPTQ: the part of the mean diagonal that is added to the Hessian's.
        act_order: GPTQ: columns by falling diagonal of the Hessian; with groups, groups first and then
            columns within them, so that a group stays contiguous.

    Raises:
        PassError: no linear matches a target, a group size does not divide a matched linear's input, or
            GPTQ finds an input that it cannot work with (nothing seen, singular Hessian).
    """

    kind: ClassVar[Kind] = "lossy"
    ensures: ClassVar[tuple[str, ...]] = ("weights quantized",)

    bits: int = 4
    group_size: int | Literal["auto"] | None = "auto"
    symmetric: bool = True
    method: str = "rtn"
    clip_search: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    head: int | None = 4
    damping: float = 0.01
    act_order: bool = False
    grid: str = "int"

    def __post_init__(self) -> None:
        require_bits(self.name, "bits", self.bits)
        require_bits(self.name, "head", self.head)
        group = self.group_size
        if group not in ("auto", None) and (isinstance(group, str) or group < 2):
            raise PassError(f"{self.name}: group_size must be 2 or more, None or 'auto', found {group!r}")
        if self.method in _OLD:
            renamed(self, f"method: {self.method}", method="rtn", grid=self.method)
        if self.method not in _METHODS:
            raise PassError(f"{self.name}: method must be one of {_METHODS}, found {self.method!r}")
        if self.method == "gptq" and self.grid != "int":
            raise PassError(f"{self.name}: gptq rounds onto the grid 'int', found {self.grid!r}: use rtn")
        for bits in (self.bits, self.head):
            self._grid(bits or self.bits)

    @property
    def needs_calibration(self) -> bool:
        return self.method == "gptq"

    def run(self, graph: fx.GraphModule) -> Report:
        report = Report()
        for node, name, weight, grid in self._sites(graph, report):
            node.update_arg(1, quantize_weight(graph, node, weight, grid))
            report.changed.append(_describe(name, grid))
        finish(graph)
        return report

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        report, traced = Report(), ways(graph)
        sites = {
            node: (name, grid)
            for node, name, _, grid in self._sites(graph, report)
            if isinstance(grid, Integers)  # all of them, as `__post_init__` has seen
        }
        report.notes |= gptq_linears(
            graph,
            sites,
            calibration.tokens,
            damping=self.damping,
            act_order=self.act_order,
            work=calibration.work,
            on_progress=partial(calibration.on_progress, self.name),
            store=partial(store_quantized, graph),
        )
        report.changed = [_describe(name, grid) for name, grid in sites.values()]
        finish(graph)
        keep_ways(graph, {node: traced[node] for node in sites})
        return report

    def _sites(self, graph: fx.GraphModule, report: Report) -> Iterator[tuple[fx.Node, str, fx.Node, Grid]]:
        """Each linear to quantize, its name, its weight, and the grid; the others go to the report."""
        require_float32(graph, self.name)
        known, names = constants(graph), site_names(graph)
        shapes = infer_shapes(graph, only=known)
        require_match(self.name, self.targets, names.values())
        branch = "a low-rank branch: name it in targets, or run merge-lora first"
        special = by_name_only(graph, shapes)
        special |= dict.fromkeys(unnamed_branches(graph, self.targets), branch)
        for node, name in names.items():
            bits = self.head if is_head(node) else self.bits
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            left = why_left(node, name, self.targets, self.exclude, special)
            if bits is None or left:
                report.left.append((name, left or "left in floating point by the options"))
            elif weight not in known:
                report.left.append((name, "its weight is quantized already"))
            else:
                grid = self._grid(bits)
                require_group(self.name, name, int(shapes[weight].shape[-1]), grid.group_size)
                yield node, name, weight, grid
        others, report.notes["vectors"] = remaining(graph)
        report.left += others

    def _grid(self, bits: int) -> Grid:
        group = 32 if self.group_size == "auto" else self.group_size
        if bits == 8 and (self.group_size == "auto" or self.bits < 8):
            group = None
        return make_grid(self.grid, bits, group, self.symmetric, self.clip_search)


def _describe(name: str, grid: Grid) -> str:
    groups = f"groups of {grid.group_size}" if grid.group_size else "per channel"
    return f"{name}: {grid.bits} bits, {groups}"
