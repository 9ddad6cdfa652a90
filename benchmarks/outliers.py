"""Outliers of the residual stream and of the down projections' inputs, before and after rotation."""

from __future__ import annotations

from statistics import median

import torch
from common import captured, options, tokens_of
from torch import Tensor, fx

from rolora_passes import FuseNorm, InsertHadamard, Rotate, apply_passes
from rolora_passes.graphs.graph import is_op, linears, values


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


def measure(graph: fx.GraphModule, tokens: Tensor) -> dict[str, tuple[float, float, float]]:
    """By kind of site: median kurtosis, worst kurtosis, median of max/median."""
    wanted = {node: kind for kind, nodes in sites(graph).items() for node in nodes}
    found: dict[str, list[tuple[float, float]]] = {}
    for node, value in values(graph, tokens):
        if node in wanted:
            x = value[0, 1:].double()  # the first token is an attention sink of its own kind
            found.setdefault(wanted[node], []).append((kurtosis(x), peak(x)))
    return {
        kind: (median(k for k, _ in rows), max(k for k, _ in rows), median(p for _, p in rows))
        for kind, rows in found.items()
    }


def main() -> None:
    """Print the table."""
    arguments = options(__doc__ or "").parse_args()
    torch.manual_seed(0)
    graph, tokenizer = captured(arguments.model)
    tokens = tokens_of(tokenizer, arguments.text, 256)
    fused = apply_passes(graph, [FuseNorm()], verify=False)
    rotated = apply_passes(fused, [Rotate(), InsertHadamard()], verify=False)
    print(f"{tokens.shape[1]} tokens; kurtosis 3 is Gaussian")
    print(f"{'':34}{'kurtosis, median':>18}{'worst':>10}{'max/median':>12}")
    for name, stage in (("before", fused), ("after", rotated)):
        for kind, row in measure(stage, tokens).items():
            print(f"{kind:20}{name:14}{row[0]:18.1f}{row[1]:10.1f}{row[2]:12.1f}")


if __name__ == "__main__":
    main()
