"""A recipe with and without its quantizers: two graphs whose values of the same name can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.manager import Record, apply_passes


def float_twin_recipe(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass], list[Pass]]:
    """(the passes before the first lossy one, the exact passes from there on, all passes from there on).

    Both graphs have the training that precedes the first lossy pass. Training after it compensates for
    rounding, so the twin, which rounds nothing, goes without.

    Raises:
        PassError: no pass of the recipe is lossy.
    """
    lossy = [number for number, step in enumerate(passes) if step.kind == "lossy"]
    if not lossy:
        found = ", ".join(step.name for step in passes) or "no passes"
        raise PassError(f"expected a recipe with a pass that quantizes, found {found}")
    before, rest = list(passes[: lossy[0]]), list(passes[lossy[0] :])
    return before, [step for step in rest if step.exact], rest


def with_float_twin(
    graph: fx.GraphModule,
    passes: Sequence[Pass],
    *,
    calibration: Calibration | None = None,
    verify: bool = True,
    on_pass: Callable[[Record], None] | None = None,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(the float twin, the quantized graph) of a recipe.

    Both have the same rotations and transforms: the passes before the first lossy one are applied once, and
    tensors that no pass replaces are shared.

    Args:
        graph: before the recipe.
        calibration, verify, on_pass: as `apply_passes` takes them; `on_pass` skips the twin's.

    Raises:
        PassError: no pass of the recipe is lossy; also what `apply_passes` raises.
    """
    before, exact, rest = float_twin_recipe(passes)
    shared = apply_passes(graph, before, verify=verify, calibration=calibration, on_pass=on_pass)
    twin = apply_passes(shared, exact, verify=verify, calibration=calibration)
    return twin, apply_passes(shared, rest, verify=verify, calibration=calibration, on_pass=on_pass)
