"""The whole way: a model in, a folder out that stock runtimes can serve."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import fx

from rolora_passes.adapters.exchange import load_adapter
from rolora_passes.decoding.kv_cache import require_context
from rolora_passes.decoding.positions import tabulate
from rolora_passes.errors import LoweringError
from rolora_passes.export.executorch.lower import LoweringReport, require_methods, to_executorch
from rolora_passes.export.onnx.lower import Flavor, OnnxReport, write_onnx
from rolora_passes.export.preflight import outline, require_kernels, require_memory, require_vocabulary
from rolora_passes.export.tokenizers import require_tokenizer, save_tokenizer
from rolora_passes.extras import require
from rolora_passes.files import writing_folder
from rolora_passes.graphs.accounting import Weights, weigh
from rolora_passes.graphs.bases.rotations import load_rotations, save_rotations
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.info import info
from rolora_passes.loading.models import load_model, load_tokenizer
from rolora_passes.passes.add_lora import AddLoRA
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.manager import (
    Applied,
    Record,
    apply_passes,
    check_order,
    history,
    require_calibration,
    steps,
)
from rolora_passes.recipes import dump_recipe, load_recipe, settled
from rolora_passes.version import versions

Target = Literal["executorch", "onnx"]
Check = Callable[[fx.GraphModule, fx.GraphModule, Path, Any], list[dict[str, Any]]]
"""(captured graph, graph as lowered, folder with the programs, tokenizer) -> rows of a table."""
_NEEDS = {"executorch": "executorch.version", "onnx": "onnx_ir"}


@dataclass(frozen=True)
class Made:
    """What a recipe made of a model, before it is lowered.

    Attributes:
        captured, graph: before the recipe and after it.
        steps: every pass as it was applied.
        tokenizer: the model's.
        calibration: what the passes were given.
    """

    captured: fx.GraphModule
    graph: fx.GraphModule
    steps: list[Applied]
    tokenizer: Any
    calibration: Calibration | None


Judge = Callable[[Made], dict[str, Any]]
"""What a recipe made -> what it lost, for the manifest; or it raises, and nothing is lowered."""


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
    lowerings: dict[str, LoweringReport | OnnxReport]
    parity: list[dict[str, Any]]
    seconds: dict[str, float]
    loss: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Lowering:
    """What `compile_model` was asked to lower to, and how; `run`: run what was written."""

    targets: tuple[Target, ...]
    max_length: int
    fast_prefill: bool
    flavor: Flavor
    accuracy_level: int | None
    run: bool

    def __post_init__(self) -> None:
        require_context(self.max_length)
        unknown = [target for target in self.targets if target not in get_args(Target)]
        if unknown or not self.targets:
            expected = ", ".join(get_args(Target))
            raise LoweringError(f"expected targets of {expected}, found {', '.join(unknown) or 'none'}")
        for target in self.targets:
            require(_NEEDS[target], target)

    def __call__(
        self, target: Target, graph: fx.GraphModule, folder: Path, methods: Mapping[str, fx.GraphModule]
    ) -> LoweringReport | OnnxReport:
        """Write one target's program to a folder."""
        if target == "executorch":
            options: Any = {"fast_prefill": self.fast_prefill, "methods": methods}
            path = folder / "model.pte"
            return to_executorch(graph, path, max_length=self.max_length, check=self.run, **options)
        options = {"max_length": self.max_length, "accuracy_level": self.accuracy_level}
        return write_onnx(graph, folder, self.flavor, check=self.run, **options)


def compile_model(
    source: str,
    recipe: str | Path,
    folder: str | Path,
    *,
    targets: Sequence[Target] = ("executorch",),
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

    The folder holds `model.pte`, or `model.onnx` with its data and `genai_config.json`, or both; the
    tokenizer, `recipe.yaml`, `manifest.json` (versions, what every pass did, the census of every lowering),
    and `R.bin` and `rotations.json` where the recipe rotates.

    What can be known without the weights is known before they are loaded: what the recipe asks of the
    kernels is tried on a stand-in (see `export.preflight`), and adapters, rotations, the tokenizer and the
    calibration text are read.

    Args:
        source: a model folder, a hub name, or a `.gguf` file.
        recipe: a recipe's name or file.
        folder: where to write; a compiled folder there is replaced, anything else is not.
        targets: "executorch", "onnx", or both, for which the passes are run once.
        max_length: tokens of context the programs hold.
        fast_prefill: see `to_executorch`.
        flavor, accuracy_level: see `to_onnx`.
        seed: see `load_recipe`.
        adapters: folders of PEFT adapters by name: methods of the `.pte`, beside `forward`, which have what
            the recipe made and this adapter; copies go into `adapters`.
        calibration: makes the calibration data of passes that look at data, given the model's tokenizer.
        on_stage, on_pass: called as the work goes on, for progress.
        on_warning: called with each of the result's warnings before the work begins.
        printing: what `apply_passes` is to print and to keep of failures: its arguments by name.
        run: run what was written, and refuse to leave a program that does not compute what its graph does.
        judge: called with what the passes made, before it is lowered, to say how far it is from the model.
        check: called with the finished programs, to compare them; its rows go into the manifest.

    Raises:
        LoweringError: an unknown target, a length below 16 or beyond the positions that the model has,
            adapters for ONNX alone or named as no method can be, or what cannot be lowered.
        FileExistsError: `folder` is something else than a compiled folder.
        MissingExtraError: what writes a target's programs is not installed.
        RoloraError: also what `load_model`, `load_recipe`, `capture`, `apply_passes` and `judge` raise.
    """
    lower = _Lowering(tuple(dict.fromkeys(targets)), max_length, fast_prefill, flavor, accuracy_level, run)
    _require_adapters(adapters := adapters or {}, lower.targets)
    passes = load_recipe(recipe, seed)
    check_order(passes, ["canonical"])
    if calibration is None:
        require_calibration(passes, None)
    _require_replaceable(Path(folder))
    _require_files(passes)
    clock = _Clock(on_stage)
    with clock.stage("preflight"):
        warnings, data = _preflight(source, passes, lower, calibration)
    if on_warning is not None:
        for warning in warnings:
            on_warning(warning)
    printing = {"verify": verify, "on_pass": on_pass, **(printing or {})}
    with writing_folder(folder) as temporary:
        made, methods = _make(source, passes, adapters, max_length, data, judge is not None, printing, clock)
        loss: dict[str, Any] = {}
        if judge is not None:
            with clock.stage("judge"):
                loss = judge(made)
            made.steps.clear()
        lowerings: dict[str, LoweringReport | OnnxReport] = {}
        for target in lower.targets:
            with clock.stage(f"lower to {target}"):
                lowerings[target] = lower(target, made.graph, temporary, methods)
        save_tokenizer(source, made.tokenizer, temporary)
        _keep_inputs(temporary, made.graph, passes, adapters)
        weights, records = weigh(made.graph), history(made.graph)
        compiled = Compiled(Path(folder), weights, records, lowerings, [], clock.seconds, loss, warnings)
        about = _manifest(source, info(made.graph).config, compiled, max_length)
        (temporary / "manifest.json").write_text(json.dumps(about, indent=1), "utf-8")
        if check is not None:
            with clock.stage("compare"):
                compiled.parity.extend(check(made.captured, made.graph, temporary, made.tokenizer))
            about["parity"] = compiled.parity
            (temporary / "manifest.json").write_text(json.dumps(about, indent=1), "utf-8")
    return compiled


def _make(
    source: str,
    passes: Sequence[Pass],
    adapters: Mapping[str, str | Path],
    max_length: int,
    calibration: Calibration | None,
    keep: bool,
    known: Mapping[str, Any],
    clock: _Clock,
) -> tuple[Made, dict[str, fx.GraphModule]]:
    """Load and capture a model and apply passes; also what adapters make of the result, by name.

    Args:
        keep: keep the graph after every pass.
        known: more arguments of `apply_passes`.
    """
    with clock.stage("load"):
        model, tokenizer = load_model(source)
    with clock.stage("capture"):
        captured = capture(model)
        del model
        _require_positions(captured, max_length)
    graph, kept, how = captured, list[Applied](), {**known}
    tell = how.pop("on_pass") or (lambda record: None)
    with clock.stage("passes"):
        for applied in steps(captured, passes, calibration=calibration, **how):
            tell(applied.record)
            graph = applied.graph
            kept += [applied] if keep else []
        own = {name: known[name] for name in ("verify", "on_pass")}
        methods = {
            name: apply_passes(graph, [AddLoRA(adapter=adapter)], **own) for name, adapter in adapters.items()
        }
    return Made(captured, graph, kept, tokenizer, calibration), methods


def _preflight(
    source: str, passes: Sequence[Pass], lower: _Lowering, calibration: Callable[[Any], Calibration] | None
) -> tuple[list[str], Calibration | None]:
    """Refuse what the model's configuration and tokenizer show to be impossible.

    Returns: what a user should know, and the calibration data.
    """
    known = outline(source)
    require_memory(known, passes, lower.max_length)
    small = dataclasses.replace(lower, max_length=16, fast_prefill=False, run=False)
    require_kernels(known, passes, [partial(_try, small, target) for target in lower.targets])
    tokenizer = load_tokenizer(source)
    warnings = require_tokenizer(source, lower.targets, tokenizer)
    require_vocabulary(known, tokenizer)
    data = None if calibration is None else calibration(tokenizer)
    require_calibration(passes, data, known.vocabulary)
    if known.positions is None or lower.max_length <= known.positions:
        return warnings, data
    return [
        *warnings,
        f"the programs hold {lower.max_length} tokens, and the model is made for {known.positions} "
        "(max_position_embeddings): what it says after these means little; give a smaller --max-length",
    ], data


def _try(lower: _Lowering, target: Target, graph: fx.GraphModule, folder: Path) -> None:
    lower(target, graph, folder, {})


def _require_files(passes: Sequence[Pass]) -> None:
    """Read the adapters and rotations that a recipe names."""
    for step in passes:
        given, adapter = (getattr(step, name, None) for name in ("given", "adapter"))
        if isinstance(given, (str, Path)):
            load_rotations(given)
        if adapter is not None:
            load_adapter(adapter)


def _require_positions(graph: fx.GraphModule, max_length: int) -> None:
    """Refuse a context that learned position embeddings are too few for, before any pass has run."""
    for positions in graph.graph.find_nodes(op="placeholder", target="positions"):
        tabulate(graph, positions, max_length)


def _keep_inputs(
    folder: Path, graph: fx.GraphModule, passes: Sequence[Pass], adapters: Mapping[str, str | Path]
) -> None:
    """Put beside the programs what they were made of: the recipe, adapters, rotations."""
    for name, adapter in adapters.items():
        shutil.copytree(adapter, folder / "adapters" / name)
    kept = _with_adapters(settled(passes, "rotations.json"), folder)
    (folder / "recipe.yaml").write_text(dump_recipe(kept), "utf-8")
    if info(graph).rotations:
        save_rotations(graph, folder)


def _with_adapters(passes: Sequence[Pass], folder: Path) -> list[Pass]:
    """The passes, with adapters that they load copied to a folder: the recipe there goes with it."""
    found: list[Pass] = []
    for step in passes:
        if isinstance(step, AddLoRA) and step.adapter is not None:
            name = "adapter" if not (folder / "adapter").exists() else f"adapter-{len(found)}"
            shutil.copytree(step.adapter, folder / name)
            step = dataclasses.replace(step, adapter=name)
        found.append(step)
    return found


def _require_adapters(adapters: Mapping[str, str | Path], targets: Sequence[str]) -> None:
    if adapters and "executorch" not in targets:
        raise LoweringError(
            f"expected target executorch, whose methods adapters are, found {', '.join(targets)}"
        )
    require_methods(adapters)
    for folder in adapters.values():
        load_adapter(folder)


def _require_replaceable(folder: Path) -> None:
    programs = ("model.pte", "model.onnx")
    compiled = (folder / "manifest.json").is_file() and any((folder / p).is_file() for p in programs)
    if folder.exists() and not compiled and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not a compiled folder; choose another name")


class _Clock:
    """Seconds by stage."""

    def __init__(self, on_stage: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._tell = on_stage or (lambda name: None)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._tell(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def _manifest(source: str, config: Mapping[str, Any], compiled: Compiled, max_length: int) -> dict[str, Any]:
    weights = compiled.weights
    return {
        "source": Path(source).name,
        "targets": {name: _figures(report) for name, report in compiled.lowerings.items()},
        "max_length": max_length,
        "config": config,
        "versions": versions(),
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


def _figures(report: LoweringReport | OnnxReport) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name != "path"}
