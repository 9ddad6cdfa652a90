"""FoldConstants: evaluate what the passes wrote about each parameter, once, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from rolora_passes.graphs.folding import fold, rounds
from rolora_passes.passes.base import Pass, Report


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Turn every constant expression into a parameter.

    Before:                                              After:
        linear(x, hadamard(rotate(mul(W, g), R1, 0), f))     linear(x, W')

    Each expression is evaluated in float64 and cast once, to the type that it has in the graph; see
    `rolora_passes.graphs.folding.fold`.

    Raises:
        PassError: an expression came out NaN or infinite; names the parameter.
    """

    ensures: ClassVar[tuple[str, ...]] = ("folded",)

    def run(self, graph: fx.GraphModule) -> Report:
        return Report(changed=fold(graph))

    def verify(self, before: fx.GraphModule, after: fx.GraphModule, report: Report) -> float | None:
        """As for every exact pass, unless a quantizer is folded: in float64 some ties break otherwise."""
        return None if rounds(before) else super().verify(before, after, report)
