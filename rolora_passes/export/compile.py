"""The whole way: a model in, a folder out that stock runtimes can serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rolora_passes.decoding.positions import tabulate
from rolora_passes.errors import LoweringError
from rolora_passes.export.clock import Clock
from rolora_passes.export.folder import figures, keep_inputs, require_replaceable, write_manifest
from rolora_passes.export.from_cpu import from_cpu
from rolora_passes.export.onnx.lower import Flavor
from rolora_passes.export.order import Check, Judge, Made, Order
from rolora_passes.export.preflight import (
    outline,
    require_kernels,
    require_memory,
    require_vocabulary,
)
from rolora_passes.export.target import TARGETS, Lowered, Target, make_target
from rolora_passes.export.tokenizers import require_tokenizer, save_tokenizer
from rolora_passes.files import writing_folder
from rolora_passes.graphs.accounting import Weights, weigh
from rolora_passes.graphs.graph import copy_graph
from rolora_passes.graphs.identity import Untouched
from rolora_passes.graphs.info import info
from rolora_passes.loading.models import load_tokenizer
from rolora_passes.ondisk import spilling
from rolora_passes.passes.add_lora import AddLoRA
from rolora_passes.passes.base import Calibration
from rolora_passes.passes.manager import Applied, Record, apply_passes, history, require_calibration, steps
from rolora_passes.passes.registry import PASSES
from rolora_passes.recipes.opening import load_passes, open_source
from rolora_passes.version import versions

# Of a program from its graph, in nats per token: kernels round otherwise by a few hundredths at most.
_FAR = 0.5


@dataclass(frozen=True)
class Compiled:
    """What `compile_model` wrote and what it measured on the way.

    Attributes:
        lowerings: by target.
        parity: what `check` returned.
        loss: what `judge` returned.
        warnings: what a user should know, in sentences.
    """

    folder: Path
    weights: Weights
    history: list[Record]
    lowerings: dict[str, Lowered]
    parity: list[dict[str, Any]]
    seconds: dict[str, float]
    loss: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def compile_model(
    source: str,
    recipe: str | Path,
    folder: str | Path,
    *,
    targets: Sequence[Target | str] = ("executorch",),
    max_length: int = 512,
    fast_prefill: bool = False,
    flavor: Flavor = "ort",
    accuracy_level: int | None = None,
    verify: bool = True,
    seed: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    calibration: Callable[[Any], Calibration] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_pass: Callable[[Record], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    printing: Mapping[str, Any] | None = None,
    run: bool = True,
    judge: Judge | None = None,
    check: Check | None = None,
) -> Compiled:
    """Load, capture, transform and lower a model to `folder`, which appears whole or not at all.

    The folder holds the programs (`model.pte`; `model.onnx`, its data and `genai_config.json`), the
    tokenizer, `recipe.yaml`, `manifest.json`, and `R.bin` and `rotations.json` where the recipe rotates. What
    can be known without the weights is known before they are loaded (see `export.preflight`). `Order`
    describes the other arguments.

    Args:
        recipe: its name or file; with `seed`, see `load_recipe`.
        targets: names, for which `fast_prefill`, `flavor` and `accuracy_level` hold, or targets as they are.
        on_stage, on_pass, on_warning: called as the work goes on.
        source, max_length, adapters, calibration, run, judge, check: see `export.order.Order`.

    Raises:
        FileExistsError: `folder` is something else than a compiled folder.
        RoloraError: what `Order`, `load_recipe`, `open_source`, `apply_passes`, `judge` and the lowerings
            raise.
    """
    chosen = _targets(targets, fast_prefill, flavor, accuracy_level)
    printing = {"verify": verify, "on_pass": on_pass, **(printing or {})}
    passes = load_passes(recipe, seed)
    order = Order(
        source, passes, chosen, max_length, adapters or {}, calibration, run, judge, check, printing
    )
    require_replaceable(Path(folder))
    warnings, data = _preflight(order, clock := Clock(tell=on_stage))
    tell = on_warning or (lambda warning: None)
    for warning in warnings:
        tell(warning)
    with writing_folder(folder) as temporary, spilling(temporary.parent):
        made = _make(order, data, clock)
        loss = _judge(order, made, clock)
        lowered = _lower(order, made, temporary, clock)
        compiled = Compiled(
            Path(folder), weigh(made.graph), history(made.graph), lowered, [], clock.seconds, loss, warnings
        )
        _keep(order, made, compiled, temporary)
        _compare(order, made, compiled, temporary, clock)
    return replace(compiled, lowerings={n: _at(compiled.folder, each) for n, each in lowered.items()})


def _at(folder: Path, lowered: Any) -> Lowered:
    """What was lowered, where it is now that its folder has its name."""
    placed: Lowered = replace(lowered, path=folder / lowered.path.name)
    return placed


def _targets(
    targets: Sequence[Target | str], fast_prefill: bool, flavor: Flavor, accuracy_level: int | None
) -> tuple[Target, ...]:
    own: dict[Any, dict[str, Any]] = {
        "executorch": {"fast_prefill": fast_prefill},
        "onnx": {"flavor": flavor, "accuracy_level": accuracy_level},
    }
    return tuple(make_target(target, **own.get(target, {})) for target in dict.fromkeys(targets))


def _preflight(order: Order, clock: Clock) -> tuple[list[str], Calibration | None]:
    """Refuse what the model's configuration and tokenizer show to be impossible.

    Returns: what a user should know, and the calibration data.
    """
    with clock.step("preflight"):
        known = outline(order.source)
        require_memory(known, order.passes, order.max_length)
        require_kernels(known, order.passes, order.targets)
        tokenizer = load_tokenizer(order.source)
        warnings = [clash for target in order.targets for clash in TARGETS.clashes(target.name)]
        warnings += require_tokenizer(order.source, order.targets, tokenizer)
        require_vocabulary(known, tokenizer)
        data = None if order.calibration is None else order.calibration(tokenizer)
        require_calibration(order.passes, data, known.vocabulary)
    if known.positions is not None and order.max_length > known.positions:
        warnings.append(
            f"the programs hold {order.max_length} tokens, and the model is made for {known.positions} "
            "(max_position_embeddings): what it says after these means little; give a smaller --max-length"
        )
    return warnings, data


def _make(order: Order, calibration: Calibration | None, clock: Clock) -> Made:
    """Open the model, and apply the passes, whose graphs are kept if there is a judge."""
    with clock.stages({"loading": "load", "capturing": "capture"}) as stage:
        opened = open_source(order.source, order.passes, calibration=calibration, on_stage=stage)
        captured = opened.graph
        for positions in captured.graph.find_nodes(op="placeholder", target="positions"):
            tabulate(captured, positions, order.max_length)  # refuses a context beyond learned positions
    graph, kept, how = captured, list[Applied](), {**order.printing}
    tell = how.pop("on_pass") or (lambda record: None)
    with clock.step("passes"):
        for applied in steps(captured, order.passes, calibration=calibration, **how):
            tell(applied.record)
            graph = applied.graph
            kept += [applied] if order.judge is not None else []
        own = {name: order.printing[name] for name in ("verify", "on_pass")}
        methods = {
            name: apply_passes(graph, [AddLoRA(adapter=adapter)], **own)
            for name, adapter in order.adapters.items()
        }
    return Made(captured, graph, kept, opened.tokenizer, calibration, methods)


def _judge(order: Order, made: Made, clock: Clock) -> dict[str, Any]:
    """What the recipe lost; nothing where nobody is to say."""
    if order.judge is None:
        return {}
    with clock.step("judge"):
        loss = order.judge(made)
    made.steps.clear()
    return loss


def _lower(order: Order, made: Made, folder: Path, clock: Clock) -> dict[str, Lowered]:
    """Write every target's program."""
    lowered = dict[str, Lowered]()
    options: Any = {"max_length": order.max_length, "check": order.run}
    for target in order.targets:
        with clock.step(f"lower to {target.name}"), TARGETS.telling(target.name):
            methods = made.methods if target.has_methods else {}
            tensors, lower = Untouched(made.graph), from_cpu(target.lower)
            lowered[target.name] = lower(copy_graph(made.graph), folder, methods=methods, **options)
            if written := tensors.written():
                raise LoweringError(f"the target {target.name} wrote into the graph's tensors: {written[0]}")
    return lowered


def _keep(order: Order, made: Made, compiled: Compiled, folder: Path) -> None:
    """Put beside the programs what they need and what they were made of."""
    save_tokenizer(order.source, made.tokenizer, folder)
    keep_inputs(folder, made.graph, order.passes, order.adapters)
    write_manifest(folder, _describe(order, made, compiled))


def _compare(order: Order, made: Made, compiled: Compiled, folder: Path, clock: Clock) -> None:
    """Have the finished programs compared, and add to the manifest what was found."""
    if order.check is None:
        return
    with clock.step("compare"):
        compiled.parity.extend(order.check(made.captured, made.graph, folder, made.tokenizer))
    compiled.warnings.extend(
        f"the program of {row['name']} is far from its graph: KL is {row['kl_graph']:.2g} nats per token"
        for row in compiled.parity
        if row.get("kl_graph", 0) > _FAR
    )
    write_manifest(folder, _describe(order, made, compiled) | {"parity": compiled.parity})


def _describe(order: Order, made: Made, compiled: Compiled) -> dict[str, Any]:
    weights = compiled.weights
    return {
        "source": Path(order.source).name,
        "targets": {name: figures(lowered) for name, lowered in compiled.lowerings.items()},
        "max_length": order.max_length,
        "config": info(made.graph).config,
        "versions": versions(),
        "packages": _packages(order, compiled),
        "passes": [record.row() for record in compiled.history],
        "weights": {
            "elements": weights.elements,
            "bits_per_weight": round(weights.bits_per_weight, 3),
            "by_bits": weights.by_bits,
        },
        "seconds": compiled.seconds,
        **({"loss": compiled.loss} if compiled.loss else {}),
        **({"warnings": compiled.warnings} if compiled.warnings else {}),
    }


def _packages(order: Order, compiled: Compiled) -> dict[str, str]:
    """The passes and targets that are not ours, with the packages and versions that they are of."""
    passes = {r.name: PASSES.origin(r.name) for r in compiled.history if r.name in PASSES}
    targets = {target.name: TARGETS.origin(target.name) for target in order.targets if target.name in TARGETS}
    return {name: origin for name, origin in {**passes, **targets}.items() if origin is not None}
