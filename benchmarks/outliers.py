"""Outliers of the residual stream and of the down projections' inputs, before and after rotation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from common import captured, options, tokens_of
from torch import Tensor, fx

from rolora_passes import FuseNorm, InsertHadamard, Rotate, apply_passes
from rolora_passes.graphs.graph import is_op, linears
from rolora_passes.graphs.running import values


def kurtosis(x: Tensor) -> float:
    """Of all elements, token by token normalised to unit variance; 3 for a Gaussian."""
    centred = x - x.mean(-1, keepdim=True)
    return float((centred**4).mean() / (centred**2).mean() ** 2)


def peak(x: Tensor) -> float:
    """Median over tokens of max|x| / median|x|."""
    magnitude = x.abs()
    return float((magnitude.amax(-1) / magnitude.median(-1).values).median())


def sites(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Residual stream: what the norms read. Down projections: linears that read a product."""
    norms = [n.args[0] for n in graph.graph.nodes if is_op(n, "rms_norm")]
    wide = [n.args[0] for n in linears(graph) if is_op(n.args[0], "mul", "hadamard")]
    return {"residual stream": list(dict.fromkeys(norms)), "down_proj input": list(dict.fromkeys(wide))}


@dataclass(frozen=True)
class Site:
    """A value [S, n] without its first token, which is an attention sink of its own kind.

    Attributes:
        channels: the largest magnitude of every channel, [n].
    """

    kurtosis: float
    peak: float
    channels: Tensor


def measure(graph: fx.GraphModule, tokens: Tensor) -> dict[str, list[Site]]:
    """The sites of every kind, in graph order."""
    wanted = {node: kind for kind, nodes in sites(graph).items() for node in nodes}
    found: dict[str, list[Site]] = {}
    for node, value in values(graph, tokens):
        if node in wanted:
            x = value[0, 1:].double()
            found.setdefault(wanted[node], []).append(Site(kurtosis(x), peak(x), x.abs().amax(0)))
    return found


def draw(before: dict[str, list[Site]], after: dict[str, list[Site]], path: Path) -> None:
    """The site of every kind whose kurtosis is the median before rotation, as it is before and after."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "outliers", "svg.fonttype": "none", "font.size": 9})
    figure, rows = pyplot.subplots(2, 2, figsize=(9, 4), layout="constrained", sharey="row")
    for axes, kind in zip(rows, before, strict=True):
        order = sorted(range(len(before[kind])), key=lambda i: before[kind][i].kurtosis)
        middle = order[(len(order) - 1) // 2]
        stages = (("before rotation", before, "#c0504d"), ("after", after, "#1f4e79"))
        for ax, (name, found, color) in zip(axes, stages, strict=True):
            site = found[kind][middle]
            ax.vlines(range(len(site.channels)), 0, site.channels, color=color, linewidth=0.6)
            ax.set_title(f"{kind}, {name}: kurtosis {site.kurtosis:.1f}", fontsize=9)
            ax.set(xlim=(0, len(site.channels)), ylim=(0, None))
            ax.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("largest |value|")
    for ax in rows[-1]:
        ax.set_xlabel("channel")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=100)


def main() -> None:
    """Print the table; draw it."""
    parser = options(__doc__ or "")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw one site of each kind there")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    graph, tokenizer = captured(arguments.model)
    tokens = tokens_of(tokenizer, arguments.text, 256)
    fused = apply_passes(graph, [FuseNorm()], verify=False)
    rotated = apply_passes(fused, [Rotate(), InsertHadamard()], verify=False)
    print(f"{tokens.shape[1]} tokens; kurtosis 3 is Gaussian")
    print(f"{'':34}{'kurtosis, median':>18}{'worst':>10}{'max/median':>12}")
    stages = {name: measure(stage, tokens) for name, stage in (("before", fused), ("after", rotated))}
    for name, found in stages.items():
        for kind, row in found.items():
            size = [site.kurtosis for site in row]
            high = median(site.peak for site in row)
            print(f"{kind:20}{name:14}{median(size):18.1f}{max(size):10.1f}{high:12.1f}")
    if arguments.picture:
        draw(stages["before"], stages["after"], arguments.picture)


if __name__ == "__main__":
    main()
