"""Ablation: one site back in floating point, or one online Hadamard removed, everything else unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, fx

from rolora_passes.debugging.splice import Losses, Splice
from rolora_passes.errors import PassError
from rolora_passes.passes.base import Pass
from rolora_passes.passes.insert_hadamard import InsertHadamard


@dataclass(frozen=True)
class Change:
    """The effect of one change on a quantized graph.

    Attributes:
        site: where.
        kl: change of the divergence from the float twin, nats per token; negative is better.
        nll: change of the next token's mean negative log-likelihood, nats.
    """

    site: str
    kl: float
    nll: float


@dataclass(frozen=True)
class Counterfactuals:
    """One change at a time.

    Attributes:
        kl, nll: of the unchanged quantized graph against its float twin, nats per token.
        changes: those with the largest effect first.
    """

    kl: float
    nll: float
    changes: list[Change]

    def row(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


def sites_in_float(
    twin: fx.GraphModule,
    quantized: fx.GraphModule,
    tokens: Tensor,
    on_progress: Callable[[int, int], None] | None = None,
) -> Counterfactuals:
    """Put one site at a time back in floating point: its weight and its input, or an attention's cache.

    This is the converse of `evaluation.sensitivity`, which quantizes one site at a time. The two agree where
    losses add up, and differ where the errors of sites compensate or amplify each other.

    Args:
        twin, quantized: as `with_float_twin` returns them.
        tokens: int64 [N, S] of real text.
        on_progress: called with the sites done and their number.
    """
    splice = Splice(quantized, twin)
    return _one_by_one(splice, list(splice.sites), twin, tokens, on_progress)


def without_hadamards(
    twin: fx.GraphModule,
    quantized: fx.GraphModule,
    bare: fx.GraphModule,
    tokens: Tensor,
    on_progress: Callable[[int, int], None] | None = None,
) -> Counterfactuals:
    """Remove one online Hadamard at a time, with its inverse at a linear or its counterpart in attention.

    Args:
        twin, quantized: as `with_float_twin` returns them.
        bare: the quantized graph of the same recipe without online Hadamards; see `bare_recipe`.
        tokens, on_progress: as `sites_in_float` takes them.

    Raises:
        PassError: the quantized graph has no online Hadamards.
    """
    splice = Splice(quantized, bare)
    turned = [
        name
        for name in splice.sites
        if _transforms(splice.definition(0, name)) > _transforms(splice.definition(1, name))
    ]
    if not turned:
        raise PassError("expected a recipe with insert-hadamard, found a graph without online Hadamards")
    return _one_by_one(splice, turned, twin, tokens, on_progress)


def _transforms(definition: str) -> int:
    """The number of online transforms in a definition; those with trainable factors are `kronecker`."""
    return definition.count("hadamard(") + definition.count("kronecker(")


def bare_recipe(passes: Iterable[Pass]) -> list[Pass]:
    """A recipe without its online Hadamards."""
    return [step for step in passes if not isinstance(step, InsertHadamard)]


def _one_by_one(
    splice: Splice,
    sites: Sequence[str],
    twin: fx.GraphModule,
    tokens: Tensor,
    on_progress: Callable[[int, int], None] | None,
) -> Counterfactuals:
    losses = Losses(twin, tokens)
    kl, nll = losses.of(splice.first)
    changes = []
    for done, name in enumerate(sites, 1):
        changed = losses.of(splice.graph([name]))
        changes.append(Change(splice.sites[name], changed[0] - kl, changed[1] - nll))
        if on_progress:
            on_progress(done, len(sites))
    return Counterfactuals(kl, nll, sorted(changes, key=lambda change: -abs(change.kl)))
