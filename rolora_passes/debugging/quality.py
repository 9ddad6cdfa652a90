"""Whether a recipe keeps enough of a model to lower it; if not, the cause and what may help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from rolora_passes.debugging.bisect import SiteBisection, bisect_sites, costliest, measure_passes
from rolora_passes.errors import QualityError, RoloraError
from rolora_passes.evaluation.parity import Loss, measure_loss, sample_text
from rolora_passes.export.order import Made
from rolora_passes.graphs.graph import site_names
from rolora_passes.passes.add_lora import AddLoRA
from rolora_passes.passes.base import Pass
from rolora_passes.passes.insert_hadamard import InsertHadamard
from rolora_passes.passes.manager import Applied, apply_passes
from rolora_passes.passes.quantize_weights import QuantizeWeights
from rolora_passes.passes.rotate import Rotate
from rolora_passes.passes.tune_lora import TuneLoRA

NOTED = 0.5
"""The share of a model's information whose loss is worth a warning; see `evaluation.parity.Loss`.

SmolLM2-135M loses 0.27 at rotated-8da4w and 0.35 at rtn:W4A16 (2.2 and 2.4 times the perplexity), 0.64 at
quarot-rtn:W4A4KV4 (7 times), 2.1 at rtn:W4A4 (400 times). Small random models lost 0.02 to 0.45 at 8da4w
with fused norms.
"""
REFUSED = 1.0
"""Beyond this, a guess that never reads the text is closer to the model."""
_TOKENS, _SITES = 64, 4  # tokens to find the cause with, and sites to name


def require_likeness(
    made: Made,
    accept: bool = False,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Loss:
    """Measure what a recipe loses on some English text, apart from intended changes by adapters and tuning.

    Args:
        accept: return the loss however large it is.
        on_stage, on_progress: called during the search for the cause.

    Raises:
        QualityError: the loss is beyond `REFUSED`; names the pass and the sites that lose the most.
    """
    tokens = sample_text(made.captured, made.tokenizer)
    parts = [(measure_loss(part.captured, part.graph, tokens), part) for part in _between_adapters(made)]
    loss, made = max(parts, key=lambda measured: measured[0].part)
    if accept or loss.part < REFUSED:
        return loss
    on_stage("finding the cause")
    blamed, found = _blame(made, tokens[:, :_TOKENS], on_progress)
    lines = [f"the quantized graph is far from the model: {loss}", *blamed, *_remedies(made, found)]
    raise QualityError("\n  ".join([*lines, "or accept the loss: --accept-loss"]))


def _between_adapters(made: Made) -> Iterator[Made]:
    """A recipe in parts; each begins with a graph that an adapter or its training has changed on purpose."""
    captured, steps = made.captured, list[Applied]()
    for applied in made.steps:
        if _is_meant(applied.step):
            if steps:
                yield replace(made, captured=captured, graph=steps[-1].graph, steps=steps)
            captured, steps = applied.graph, []
        else:
            steps.append(applied)
    yield replace(made, captured=captured, graph=steps[-1].graph if steps else captured, steps=steps)


def _is_meant(step: Pass) -> bool:
    """Whether a pass changes the model on purpose."""
    return isinstance(step, TuneLoRA) or (isinstance(step, AddLoRA) and not step.exact)


def _blame(
    made: Made, tokens: Tensor, on_progress: Callable[[int, int], None] | None
) -> tuple[list[str], SiteBisection | None]:
    """Lines that name the pass and the sites that lose the most; and the sites, if they can be determined."""
    worst = costliest(measure_passes(made.captured, made.steps, tokens)[0])
    if worst is None:
        return [], None
    lines = [f"{worst.name} loses the most: KL is {worst.kl:.2f} nats per token after it"]
    if worst.fault:
        return [*lines, worst.fault], None
    try:
        found = _sites(made, tokens, on_progress)
    except RoloraError as error:  # no float twin, or none that can be compared; the pass is known at least
        return [*lines, f"the sites that lose the most are not known: {error}"], None
    lines += [f"{f.site} alone: KL {f.kl:.2f} nats per token ({', '.join(f.differs)})" for f in found.faults]
    return lines, found


def _sites(made: Made, tokens: Tensor, on_progress: Callable[[int, int], None] | None) -> SiteBisection:
    """The sites that make the graph worse than its exact passes alone would."""
    first = next(i for i, applied in enumerate(made.steps) if not applied.step.exact)
    shared = made.steps[first - 1].graph if first else made.captured
    exact = [applied.step for applied in made.steps[first:] if applied.step.exact]
    twin = apply_passes(shared, exact, verify=False, calibration=made.calibration)
    return bisect_sites(twin, made.graph, tokens, most=_SITES, on_progress=on_progress)


def _remedies(made: Made, blamed: SiteBisection | None) -> list[str]:
    """What may lose less and is not in the recipe yet."""
    passes: list[Pass] = [applied.step for applied in made.steps]
    weights: list[Any] = [step for step in passes if isinstance(step, QuantizeWeights)]
    known = set(site_names(made.graph).values())
    sites = [fault.site for fault in blamed.faults if fault.site in known] if blamed else []
    found = []
    if not any(isinstance(step, (Rotate, InsertHadamard)) for step in passes):
        found.append("rotate first, as rotated-8da4w does")
    if any(step.method != "gptq" for step in weights):
        found.append("round weights by GPTQ, as rotated-gptq-8da4w does (with --calibration TEXT)")
    if weights and sites and blamed and blamed.left < blamed.kl:
        option = f"exclude: [{', '.join(sites)}]"
        found.append(
            f"leave these sites in float, `{option}` of quantize-weights: KL is then {blamed.left:.2f}"
        )
    if not weights:
        found.append("use more bits, or leave the pass out of the recipe")
    return ["what may help: " + "; ".join(found)] if found else []
