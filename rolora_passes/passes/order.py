"""What is known of a pipeline before anything runs: its order, and whether it has the data it needs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rolora_passes.errors import PassError, PassOrderError
from rolora_passes.graphs.facts import FACTS
from rolora_passes.passes.base import Calibration, Pass


def check_order(pipeline: Iterable[Pass], holding: Iterable[str]) -> None:
    """Check requirements and prohibitions along a pipeline, before anything runs.

    Args:
        holding: facts that hold of the graph that the pipeline is for.

    Raises:
        PassOrderError: names the pass, the fact, and the pass to run first or to leave out.
    """
    known = dict.fromkeys(holding, "before these passes")
    for step in pipeline:
        for fact in step.requires:
            if fact not in known:
                remedy = FACTS[fact].remedy if fact in FACTS else "see `rolora passes`"
                raise PassOrderError(
                    f"{step.name} requires a graph with {fact!r}, found {sorted(known) or 'none'}: {remedy}"
                )
        for fact in step.forbids:
            if fact in known:
                raise PassOrderError(
                    f"{step.name} cannot run on a graph that is already {fact!r} ({known[fact]}): "
                    "move it before what did that, or leave it out"
                )
        known = {fact: how for fact, how in known.items() if fact not in step.removes}
        known |= dict.fromkeys(step.ensures, f"by {step.name}")


def require_calibration(
    pipeline: Iterable[Pass], calibration: Calibration | None, vocabulary: int | None = None
) -> None:
    """Check, before anything runs, that passes that look at data have some.

    Raises:
        PassError: there is none, or it is not tokens int64 [N, S] with N and S at least 1, all of them in
            the vocabulary, if its size is known.
    """
    needy = [step.name for step in pipeline if step.needs_calibration]
    if needy and calibration is None:
        raise PassError(
            f"{needy[0]} looks at data and was given none: pass calibration=tokens, int64 [N, S] "
            "(rolora_passes.loading.data.calibration_tokens makes them from text), or --calibration FILE"
        )
    if needy and calibration is not None:
        tokens = calibration.tokens
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens.numel():
            raise PassError(
                f"expected calibration tokens int64 [N, S], found {tokens.dtype} {list(tokens.shape)}"
            )
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise PassError(
                f"expected calibration tokens of a vocabulary of {vocabulary}, found {low} to {high}: "
                "they are another tokenizer's"
            )
