"""Which pass and which sites lose the most: measuring a recipe pass by pass, and bisecting over sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.debugging.differences import what_differs
from rolora_passes.debugging.splice import Losses, Splice, divergence, predictions
from rolora_passes.debugging.twins import float_twin_recipe
from rolora_passes.errors import VerificationError
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.facts import ROUNDED, facts
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.manager import Applied, Record, apply_passes, steps

_LEFT = 0.1  # bisection ends when the remaining sites cause less than this share of the divergence
_NONE = 1e-6  # nats per token: rounding
# Divergence that rounding alone may cause over the depth of a model computing in this type, nats per token.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}


@dataclass(frozen=True)
class PassLoss:
    """What one pass of a recipe changed.

    Attributes:
        name: of the pass; `kind` is "exact", "lossy" or "trained".
        kl: divergence of the predictions from the graph before the recipe, nats per token.
        step: divergence from the graph before this pass.
        nll: growth of the next token's mean negative log-likelihood since before the recipe, nats.
        fault: for an exact pass that changed the function: by how much, and the first value that differs.
    """

    name: str
    kind: str
    kl: float
    step: float
    nll: float
    fault: str | None

    def row(self) -> dict[str, Any]:
        """JSON; a figure that is not finite is None."""
        return asdict(self) | {key: _plain(getattr(self, key)) for key in ("kl", "step", "nll")}


@dataclass(frozen=True)
class SiteFault:
    """A site that a divergence comes from.

    Attributes:
        site: the module of a linear, or the name of another value and its layer.
        kl: divergence of the good graph with only this site taken from the bad one, nats per token.
        differs: what differs there.
    """

    site: str
    kl: float
    differs: list[str]

    def row(self) -> dict[str, Any]:
        """JSON; an infinite divergence is None."""
        return asdict(self) | {"kl": _plain(self.kl)}


@dataclass(frozen=True)
class SiteBisection:
    """Where two graphs diverge.

    Attributes:
        kl: divergence of the bad graph from the good one, nats per token.
        faults: the sites found, the costliest first.
        left: the divergence that remains once these sites are taken from the good graph.
        sites: how many sites differ.
        evaluations: forward passes over the tokens that were needed.
    """

    kl: float
    faults: list[SiteFault]
    left: float
    sites: int
    evaluations: int

    @property
    def diffuse(self) -> bool:
        """Whether no small set of sites explains the divergence: most of it remains."""
        return self.kl > _NONE and not self.left < self.kl / 2

    def row(self) -> dict[str, Any]:
        """JSON; an infinite divergence is None."""
        plain = {"kl": _plain(self.kl), "left": _plain(self.left), "faults": [f.row() for f in self.faults]}
        return asdict(self) | plain | {"diffuse": self.diffuse}


def bisect_recipe(
    graph: fx.GraphModule,
    passes: Sequence[Pass],
    tokens: Tensor,
    *,
    most: int = 3,
    calibration: Calibration | None = None,
    on_stage: Callable[[str], None] = lambda name: None,
    on_pass: Callable[[Record], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[PassLoss], SiteBisection | None]:
    """Measure a recipe pass by pass, then bisect its quantized sites against its float twin.

    Args:
        graph, passes, tokens, calibration, on_pass: as `bisect_passes` takes them.
        most, on_progress: as `bisect_sites` takes them.
        on_stage: called with what is being done.

    Returns: the passes' losses; and the sites, or None if an exact pass is at fault or no pass is lossy.
    """
    on_stage("passes")
    known: dict[str, Any] = {
        "calibration": calibration,
        "on_pass": on_pass,
        "origin": predictions(graph, tokens),
    }
    if all(step.kind != "lossy" for step in passes):
        return bisect_passes(graph, passes, tokens, **known)[0], None
    before, exact, rest = float_twin_recipe(passes)
    losses, shared = bisect_passes(graph, before, tokens, **known)
    more, quantized = bisect_passes(shared, rest, tokens, **known)
    if any(loss.fault for loss in [*losses, *more]):
        return [*losses, *more], None
    twin = apply_passes(shared, exact, verify=False, calibration=calibration)
    on_stage("bisecting sites")
    sites = bisect_sites(twin, quantized, tokens, most=most, on_progress=on_progress)
    return [*losses, *more], sites


def bisect_passes(
    graph: fx.GraphModule,
    passes: Iterable[Pass],
    tokens: Tensor,
    *,
    origin: list[Tensor] | None = None,
    calibration: Calibration | None = None,
    on_pass: Callable[[Record], None] | None = None,
) -> tuple[list[PassLoss], fx.GraphModule]:
    """Apply a recipe pass by pass and measure what each pass changes.

    An exact pass that fails verification is reported, and the recipe goes on.

    Args:
        graph: before the recipe.
        tokens: int64 [N, S] of real text; three copies of their logits are held in memory.
        origin: the predictions that `kl` and `nll` are relative to; None for those of `graph`.
        calibration, on_pass: as `apply_passes` takes them.

    Returns: a loss for every pass, and the final graph.
    """

    def made() -> Iterator[Applied]:
        for applied in steps(graph, passes, verify=False, calibration=calibration):
            if on_pass:
                on_pass(applied.record)
            yield applied

    return measure_passes(graph, made(), tokens, origin=origin)


def measure_passes(
    graph: fx.GraphModule,
    made: Iterable[Applied],
    tokens: Tensor,
    *,
    origin: list[Tensor] | None = None,
) -> tuple[list[PassLoss], fx.GraphModule]:
    """Measure what each pass changed, as the graphs arrive.

    Args:
        graph, tokens, origin: as `bisect_passes` takes them.
        made: what `steps` yields.

    Returns: a loss for every pass, and the last graph.
    """
    found, current, logits = list[PassLoss](), graph, predictions(graph, tokens)
    origin = origin or logits
    for applied in made:
        step, after = applied.step, applied.graph
        before, logits = logits, predictions(after, tokens)
        kl, nll = divergence(logits, origin, tokens)
        moved, _ = divergence(logits, before, tokens)
        fault = _fault(applied, current) if step.exact else None
        # Where values are rounded already, other rounding of a sum moves some to the next level.
        plain = not facts(current, ROUNDED)
        if step.exact and fault is None and plain and not moved <= _ROUNDING[dtype_of(graph)]:
            fault = f"{step.name} promises to keep the function, but on these tokens KL is {moved:.1e}"
        found.append(PassLoss(step.name, applied.record.kind, kl, moved, nll, fault))
        current = after
    return found, current


def _fault(applied: Applied, before: fx.GraphModule) -> str | None:
    try:
        applied.step.verify(before, applied.graph, applied.record.report)
    except VerificationError as error:
        return str(error)
    return None


def costliest(losses: Sequence[PassLoss]) -> PassLoss | None:
    """The first exact pass that changed the function, or else the pass after which divergence grew the most.

    The largest `step` is no measure: predictions that are already off move easily without getting worse.
    """
    faulty = [loss for loss in losses if loss.fault]
    growth = [
        after.kl - before for before, after in zip([0.0, *(o.kl for o in losses)], losses, strict=False)
    ]
    most = max(range(len(losses)), key=lambda i: _order(growth[i]), default=None)
    return faulty[0] if faulty else None if most is None else losses[most]


def bisect_sites(
    good: fx.GraphModule,
    bad: fx.GraphModule,
    tokens: Tensor,
    *,
    most: int = 3,
    on_progress: Callable[[int, int], None] | None = None,
) -> SiteBisection:
    """Find the sites that make a graph worse than another graph of the same model in the same basis.

    Half of the differing sites are put into the good graph, and the half that does more harm is split again:
    log2(n) evaluations for a site that stands out, at most twice that otherwise. A site that was found is set
    aside and the search goes on, until a tenth of the divergence remains, or until a site causes less than a
    tenth of the rest, which means that no small set of sites is to blame. Sites that only do harm together
    (errors that would cancel alone) are not found.

    Args:
        good, bad: for example a float twin and its quantized graph, or two runs of one recipe.
        tokens: int64 [N, S] of real text.
        most: the largest number of sites to find.
        on_progress: called with the evaluations done and an upper bound on them.
    """
    splice, losses = Splice(good, bad), Losses(good, tokens)
    remaining, faults = list(splice.sites), list[SiteFault]()
    limit = 1 + most * (2 * math.ceil(math.log2(max(len(remaining), 2))) + 2)
    measured: dict[tuple[str, ...], float] = {(): 0.0}

    def loss(sites: list[str]) -> float:
        key = tuple(sites)
        if key not in measured:
            kl = losses.of(splice.graph(sites))[0]
            measured[key] = kl if math.isfinite(kl) else math.inf
            if on_progress:
                on_progress(losses.evaluations, limit)
        return measured[key]

    total = left = loss(remaining)
    enough = max(_LEFT * total, _NONE) if math.isfinite(total) else _NONE
    while remaining and len(faults) < most and left > enough:
        site = _heaviest(remaining, left, loss)
        faults.append(SiteFault(splice.sites[site], loss([site]), what_differs(splice, site)))
        remaining = [other for other in remaining if other != site]
        left = loss(remaining)
        if faults[-1].kl < _LEFT * left:
            break  # the rest is spread out: more bisection would only name more of it
    faults.sort(key=lambda fault: -fault.kl)
    return SiteBisection(total, faults, left, len(splice.sites), losses.evaluations)


def _heaviest(sites: list[str], whole: float, loss: Callable[[list[str]], float]) -> str:
    """The site that bisection leads to; all sites together lose `whole`."""
    while len(sites) > 1:
        halves = sites[: len(sites) // 2], sites[len(sites) // 2 :]
        first = loss(halves[0])
        if first >= whole / 2:
            sites, whole = halves[0], first
        elif first <= _LEFT * whole:  # the loss is in the other half, which need not be measured
            sites = halves[1]
        else:
            second = loss(halves[1])
            sites, whole = (halves[1], second) if second > first else (halves[0], first)
    return sites[0]


def _order(value: float) -> float:
    """A sort key that puts NaN above every number."""
    return math.inf if math.isnan(value) else value


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
