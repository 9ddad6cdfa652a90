"""How far to clip activations: the part of its range that a token's grid spans, chosen for every value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rolora_passes.graphs.evaluate import compute, let_go
from rolora_passes.graphs.running import values
from rolora_passes.numerics.affine import fake_quantize

CLIPS = [1 - i / 20 for i in range(11)]  # 1.00, 0.95, …, 0.50
_TOKENS = 512  # for one number a site


@dataclass
class Rounded:
    """A value that linears read, and how it is to be rounded.

    Attributes:
        weights: [out, in] of the linears that read it.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    weights: list[fx.Node]


def search_clips(
    graph: fx.GraphModule,
    sites: Mapping[fx.Node, Rounded],
    tokens: Tensor,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[fx.Node, float]:
    """The clip of `CLIPS` that changes the outputs of a value's linears least: Σ |(x̂ - x)Wᵀ|² over tokens.

    Values are those of the graph as it is: sites do not see each other's rounding.

    Args:
        tokens: int64 [N, S]; of their first windows, as many as hold 512 tokens, one at least.
    """
    windows, found = tokens[: max(1, _TOKENS // tokens.shape[1])], dict[fx.Node, float]()
    for node, value in values(graph, windows):
        if node in sites:
            weight = torch.cat([w.float() for w in compute(graph, sites[node].weights)])
            for read in sites[node].weights:
                if read.op == "get_attr":
                    let_go(graph, read)
            found[node] = _best(value.flatten(0, -2).float(), sites[node], weight)
            on_progress(len(found), len(sites))
    return found


def _best(x: Tensor, site: Rounded, weight: Tensor) -> float:
    rows, columns = weight.shape
    gram = weight.T @ weight if columns < rows else None  # |eWᵀ|² = e(WᵀW)eᵀ: whichever is smaller
    losses = []
    for clip in CLIPS:
        error = fake_quantize(x, site.bits, site.group_size, site.symmetric, clip) - x
        change = (error @ weight.T).square() if gram is None else (error @ gram) * error
        losses.append(float(change.sum()))
    return CLIPS[losses.index(min(losses))]
