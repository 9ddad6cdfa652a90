"""Sensitivity: how far the predictions move when one site is quantized alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import site_names
from rolora_passes.graphs.info import history
from rolora_passes.graphs.running import run
from rolora_passes.numerics.exact import exact_device
from rolora_passes.ondisk import kept, rest
from rolora_passes.passes.base import Pass
from rolora_passes.passes.manager import apply_passes

_COMPARED = 1 << 22  # logits compared at once


@dataclass(frozen=True)
class SiteLoss:
    """What quantizing one site costs.

    Attributes:
        name: of the linear.
        kl: divergence of the predictions from the unquantized graph's, nats per token.
        nll: growth of the mean negative log-likelihood of the next token, nats.
    """

    name: str
    kl: float
    nll: float


def sensitivity(
    graph: fx.GraphModule,
    quantizers: Iterable[Pass],
    tokens: Tensor,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[SiteLoss]:
    """Rank the sites of a graph by the divergence that quantizing each one alone causes.

    Losses add up roughly, so the first sites of the list are the ones to give more bits: with a first
    quantize-weights that targets them and a second for the rest.

    Args:
        graph: before quantization, with the recipe's rotations and transforms applied.
        quantizers: passes with `targets`, applied to one site at a time. Rounding to nearest replaces GPTQ:
            sites are compared here, and GPTQ would compensate for differences.
        tokens: int64 [N, S] of real text, whose logits are kept; within `ondisk.spilling` in files.
        on_progress: called with the sites done and their number.

    Returns: one entry for each linear that a quantizer changes, the costliest first.

    Raises:
        PassError: no quantizer, a quantizer without targets, or a graph without sites left to quantize.
    """
    steps = [_for_sites(step) for step in quantizers]
    if not steps:
        raise PassError("sensitivity: expected at least one quantizer, such as quantize-weights, found none")
    expected = [kept(run(graph, row[None])[0]) for row in tokens]
    names = list(site_names(graph).values())
    found = []
    for number, name in enumerate(names):
        target = "re:" + re.escape(name)
        alone = apply_passes(graph, [dataclasses.replace(s, targets=target) for s in steps], verify=False)  # type: ignore[call-arg]
        if any(record.report.changed for record in history(alone)[-len(steps) :]):
            kl, nll = _compare(alone, expected, tokens)
            found.append(SiteLoss(name, kl, nll))
        if on_progress:
            on_progress(number + 1, len(names))
    if not found:
        raise PassError(
            "sensitivity: expected a graph that is not quantized yet, found no site that quantizers change"
        )
    return sorted(found, key=lambda site: -site.kl)


def split_recipe(passes: Iterable[Pass]) -> tuple[list[Pass], list[Pass]]:
    """(the passes before the first lossy one, the quantizers that can be applied to one site alone).

    Training before the first lossy pass is kept; later training, which compensates for rounding, is not.

    Raises:
        PassError: there is no such quantizer.
    """
    steps = list(passes)
    lossy = [i for i, step in enumerate(steps) if step.kind == "lossy"]
    quantizers = [steps[i] for i in lossy if hasattr(steps[i], "targets")]
    if not quantizers:
        raise PassError(
            f"sensitivity: expected a recipe with quantize-weights or quantize-activations, found "
            f"{', '.join(step.name for step in steps) or 'no passes'}"
        )
    return steps[: lossy[0]], quantizers


def _for_sites(step: Pass) -> Pass:
    known = {f.name for f in dataclasses.fields(step)}
    if "targets" not in known:
        raise PassError(f"sensitivity: {step.name} has no targets, so it cannot quantize one site alone")
    return dataclasses.replace(step, method="rtn") if getattr(step, "method", "") == "gptq" else step  # type: ignore[call-arg]


def _compare(graph: fx.GraphModule, expected: list[Tensor], tokens: Tensor) -> tuple[float, float]:
    """(KL, growth of the next token's negative log-likelihood), both means over tokens [N, S]."""
    kl, nll = 0.0, 0.0
    for row, before in zip(tokens, expected, strict=True):
        more = compare_logits(run(graph, row[None])[0], before, row)
        rest(before)
        kl, nll = kl + more[0], nll + more[1]
    return kl / tokens.numel(), nll / (tokens.shape[0] * (tokens.shape[1] - 1))


def compare_logits(found: Tensor, expected: Tensor, row: Tensor) -> tuple[float, float, int]:
    """How far a window's predictions moved: sums over its tokens int64 [S], from logits [S, V].

    Returns: KL divergence from `expected` in nats, growth of the next token's negative log-likelihood (over
        S - 1 tokens), and the number of tokens at which both have the same top-1 prediction.
    """
    kl, nll, same, place = 0.0, 0.0, 0, exact_device(found.device)
    found, expected, row = found.to(place), expected.to(place), row.to(place)
    following = torch.cat([row[1:], row[:0]])
    rows = max(1, _COMPARED // found.shape[-1])
    for start in range(0, len(row), rows):
        p, q = (x[start : start + rows].log_softmax(-1, dtype=torch.float64) for x in (expected, found))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        target, loss = following[start : start + rows, None], p - q
        nll += float(loss[: len(target)].gather(-1, target).sum())
        kl += float((p.exp() * loss).sum())
    return kl, nll, same
