"""Rotations one at a time, each from samples of what linears read in its basis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, fx

from rolora_passes.graphs.bases.inference import BasisClass
from rolora_passes.learning.distributions import Distribution
from rolora_passes.learning.loop import Trace, train
from rolora_passes.learning.samples import Samples, Site, collect
from rolora_passes.numerics.stiefel import Variables

if TYPE_CHECKING:
    from rolora_passes.learning.options import SampleOptions


@dataclass(frozen=True)
class Learned:
    """What became of one matrix.

    Attributes:
        matrix: [n, n], float32.
        error: the largest |RᵀR - 1|.
        trace: what training did.
    """

    matrix: Tensor
    error: float
    trace: Trace


def learn_each(
    graph: fx.GraphModule,
    sites: list[Site],
    starts: Mapping[BasisClass, Tensor],
    tokens: Tensor,
    options: SampleOptions,
    file: Callable[[BasisClass], Path | None],
    on_progress: Callable[[str, int, int], None],
) -> Iterator[tuple[BasisClass, Learned]]:
    """Learn the matrix of every class that has a site.

    The graph runs forward alone, in stages; a gradient goes no further back than to one matrix. A matrix is
    learned as soon as its last site is computed, and its samples are let go of.

    Args:
        graph: it is only read.
        sites: of `find_sites`.
        starts: the matrices as they are in the graph, [n, n].
        tokens: int64 [N, S].
        file: where the state of a class's training is kept; None to keep nothing.
        on_progress: called with what is done, how much of it, and of how much: values that were computed and
            steps that were taken.
    """
    done, total = 0, len({site.value for site in sites}) + options.steps * len({s.cls for s in sites})

    def computed() -> None:
        nonlocal done
        done += 1
        on_progress(options.name, done, total)

    for cls, samples in collect(graph, sites, tokens, options.tokens, options.seed, computed):
        start = starts[cls].to(samples.sites[0])
        variables = Variables({cls.name: start}, {}, options.method)
        trace = train(
            Distribution(options.loss, start),
            variables,
            Samples(samples.sites, math.ceil(options.validation * len(tokens))),
            options,
            file(cls),
            lambda name, step, _, before=done: on_progress(name, before + step, total),  # type: ignore[misc]
        )
        done += options.steps
        (matrix,) = variables()
        yield cls, Learned(matrix.detach(), variables.orthogonality_error(), trace)
