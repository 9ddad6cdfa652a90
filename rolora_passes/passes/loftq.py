"""LoftQ: weights on their grids and low-rank branches beside them, found together (Li et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from rolora_passes.adapters.lora import add_branch, low_rank, require_rank, unnamed_branches, without
from rolora_passes.errors import PassError
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import constants, finish, site_names
from rolora_passes.graphs.layers import find_layers
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.sites import by_name_only, is_head, require_match, why_left
from rolora_passes.numerics.grids import make_grid
from rolora_passes.passes.base import Kind, Pass, Report, renamed
from rolora_passes.quantize.quantizers import quantize_weight, require_float32, require_group


@dataclass(frozen=True)
class LoftQ(Pass):
    """Find Q and s·B A with Q + s·B A near W, Q on a grid: quantize what the branch leaves, then decompose
    the rest.

    Before:                     After:
        y = linear(x, W)            y' = linear(x, dequantize(quantize(W - T)))
                                    y = y' + linear(linear(x, A), B) * (alpha / rank)

    From A = B = 0, `iterations` times: Q = quantize(W - s·B A); s·B A = the largest singular values of W - Q
    (Algorithm 1). It ends on the decomposition, so T is the branch of the iteration before, a constant that
    fold-constants takes in. LoftQ's own code presumes s = 1; here B A is what it should be divided by s.

    Options:
        bits (bits): 2 to 8, or between 2 and 4: the first part of the layers then has 4 bits, the rest 2, so
            that the mean is `bits` (of 32 layers at 2.5 bits, the first 8).
        group_size (channels): input channels that share a scale; None: one scale per output channel.
        grid: as quantize-weights has them: "nf" (NormalFloat), "uniform" (LoftQ's table), or "int", symmetric
            integers, which the runtimes' kernels multiply by.
        rank: the inner width of the branches.
        alpha: branches are scaled by alpha / rank.
        iterations: 1 is one decomposition of what plain quantization takes.
        targets: "all-linear" (every linear but the head and branches), or patterns over site names.
        exclude: patterns of sites to leave.
        method: what `grid` was called in 0.1, with "rtn" for "int".

    Raises:
        PassError: no linear matches a target, rank exceeds a matched linear's size, groups that do not divide
            an input, a method or width that there is no table of.
    """

    name: ClassVar[str] = "loftq"
    kind: ClassVar[Kind] = "lossy"
    ensures: ClassVar[tuple[str, ...]] = ("weights quantized",)

    bits: float = 4
    group_size: int | None = 64
    grid: str = "nf"
    rank: int = 16
    alpha: float = 16.0
    iterations: int = 5
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    method: str | None = None

    def __post_init__(self) -> None:
        if old := self.method or ("rtn" if self.grid == "rtn" else None):
            renamed(self, f"method: {old}", grid="int" if old == "rtn" else old, method=None)
        if not 2 <= self.bits <= 8 or (self.bits > 4 and self.bits != int(self.bits)):
            raise PassError(f"{self.name}: bits must be 2 to 8, whole above 4, found {self.bits}")
        for option in ("rank", "iterations"):
            if getattr(self, option) < 1:
                raise PassError(f"{self.name}: {option} must be 1 or more, found {getattr(self, option)}")
        for bits in {2, 4} if self.bits != int(self.bits) else {int(self.bits)}:
            make_grid(self.grid, bits, self.group_size)

    def run(self, graph: fx.GraphModule) -> Report:
        report, before, after = Report(), 0.0, 0.0
        for node, name, bits in list(self._sites(graph, report)):
            plain, left = self._split(graph, node, name, bits)
            before, after = before + plain**2, after + left**2
            report.changed.append(f"{name}: {bits} bits, rank {self.rank}")
        report.notes = {"error_quantized": before**0.5, "error": after**0.5}
        finish(graph)
        return report

    def _sites(self, graph: fx.GraphModule, report: Report) -> Iterator[tuple[fx.Node, str, int]]:
        """Each linear that is meant, its name, its bits; the others go to the report."""
        require_float32(graph, self.name)
        known, names = constants(graph), site_names(graph)
        shapes = infer_shapes(graph, only=known)
        bits, special = bits_by_layer(graph, self.bits), by_name_only(graph, shapes)
        branch = "a low-rank branch: name it in targets, or run merge-lora first"
        special |= dict.fromkeys(unnamed_branches(graph, self.targets), branch)
        require_match(self.name, self.targets, names.values())
        for node, name in names.items():
            weight: Any = node.args[1]
            left = why_left(node, name, self.targets, self.exclude, special)
            if is_head(node) or left:
                report.left.append((name, left or "left in floating point by the options"))
            elif weight not in known:
                report.left.append((name, "its weight is quantized already"))
            else:
                out, width = shapes[weight].shape
                require_group(self.name, name, width, self.group_size)
                require_rank(self.rank, name, (out, width), self.name)
                yield node, name, bits.get(node, min(bits.values(), default=int(self.bits)))

    def _split(self, graph: fx.GraphModule, node: Any, name: str, bits: int) -> tuple[float, float]:
        """Quantize a linear's weight and add its branch; the Frobenius errors without and with it."""
        scale, weight = self.alpha / self.rank, node.args[1]
        grid = make_grid(self.grid, bits, self.group_size)
        (exact,) = compute(graph, [weight])
        exact = exact.float()
        left = exact - grid.rounded(exact)
        plain, branch = float(left.norm()), low_rank(left, self.rank, scale)
        for _ in range(self.iterations - 1):
            taken = branch
            left = exact - grid.rounded(exact - scale * taken.b @ taken.a)
            branch = low_rank(left, self.rank, scale)
        if self.iterations > 1:
            weight = without(graph, weight, name, taken, exact.dtype)
        node.update_arg(1, quantize_weight(graph, node, weight, grid))
        add_branch(graph, node, name, branch)
        return plain, float((left - scale * branch.b @ branch.a).norm())


def bits_by_layer(graph: fx.GraphModule, bits: float) -> dict[fx.Node, int]:
    """The width of every node of a layer, for `bits` of `LoftQ`: between 2 and 4, first layers have 4."""
    layers = find_layers(graph).layers
    wide = len(layers) if bits == int(bits) else int(len(layers) * (bits - 2) / 2)
    high, low = (int(bits),) * 2 if bits == int(bits) else (4, 2)
    return {node: high if i < wide else low for i, layer in enumerate(layers) for node in layer}
