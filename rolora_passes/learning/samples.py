"""Samples of what linears read in a basis, from forward passes with one layer's weights in memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, fx

from rolora_passes.graphs.bases.inference import Bases, BasisClass
from rolora_passes.graphs.graph import argument, is_op, linears, upstream
from rolora_passes.graphs.sites import is_head
from rolora_passes.quantize.stages import Stages


@dataclass(frozen=True)
class Samples:
    """Tokens of N windows as the sites of one basis class see them.

    Attributes:
        sites: for every site float32 [N, T, outer, n, inner]: T tokens of each window, the class's factor of
            the channels in the middle.
        held: how many of the last windows are held out.
    """

    sites: list[Tensor]
    held: int = 0

    def __len__(self) -> int:
        return len(self.sites[0])

    def at(self, places: Tensor) -> Samples:
        """Those of some windows."""
        return Samples([site[places.to(site.device)] for site in self.sites])

    @property
    def predicted(self) -> int:
        """How many tokens there are at a site."""
        return self.sites[0].shape[:2].numel()


@dataclass(frozen=True)
class Site:
    """A value that linears read, whose channels are (outer, n, inner), n of them in the basis of a class."""

    value: fx.Node
    cls: BasisClass
    outer: int
    inner: int


def turned_by(cls: BasisClass) -> str | None:
    """The name of the parameter that rotate turned the axes of a class by; None if it did not."""
    for axis in cls.parameters:
        for node in upstream([axis.node]):
            place = (argument(node, "dim"), argument(node, "inner", 1)) if is_op(node, "rotate") else None
            if place == (axis.dim, axis.inner):
                return str(cast(fx.Node, node.args[1]).target)
    return None


def find_sites(graph: fx.GraphModule, bases: Bases, classes: Collection[BasisClass]) -> list[Site]:
    """What linears read in the bases of some classes, in the order of the graph.

    What the head reads is left out: quantizers leave the head in floating point.
    """
    read = {linear.args[0] for linear in linears(graph) if not is_head(linear)}
    found = []
    for value in graph.graph.nodes:
        factors = [cls for cls, _ in bases.of(value)] if value in read else []
        for place, cls in enumerate(factors):
            if cls in classes:
                outer, inner = (
                    math.prod(c.size for c in part) for part in (factors[:place], factors[place + 1 :])
                )
                found.append(Site(value, cls, outer, inner))
    return found


def collect(
    graph: fx.GraphModule,
    sites: list[Site],
    tokens: Tensor,
    count: int,
    seed: int,
    on_value: Callable[[], None],
) -> Iterator[tuple[BasisClass, Samples]]:
    """What sites read of tokens int64 [N, S], a class as soon as the last of its sites is computed.

    Together that is one forward pass for every window, in stages (`quantize.stages`). It ends at the last
    site.

    Args:
        sites: in the order of the graph.
        count: tokens to draw at a site, in equal parts from all windows.
        seed: of the draws.
        on_value: called after every value that is computed.
    """
    stages, generator = Stages(graph, tokens), torch.Generator().manual_seed(seed)
    left, found = Counter(site.cls for site in sites), dict[BasisClass, list[Tensor]]()
    for value, alike in groupby(sites, key=lambda site: site.value):
        share = math.ceil(count / len(tokens))
        drawn = torch.stack([_drawn(window, share, generator) for window in stages.advance(value)])
        on_value()
        for site in alike:
            factors = (site.outer, site.cls.size, site.inner)
            found.setdefault(site.cls, []).append(drawn.unflatten(-1, factors))
            left[site.cls] -= 1
            if not left[site.cls]:
                yield site.cls, Samples(found.pop(site.cls))


def _drawn(value: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of a value [..., C]: none twice before all are drawn; zeros where an expert read nothing."""
    rows = value.flatten(0, -2)
    if not len(rows):
        return rows.new_zeros(count, rows.shape[-1])
    order = torch.randperm(len(rows), generator=generator)
    return rows[order[torch.arange(count) % len(rows)].to(rows.device)]
