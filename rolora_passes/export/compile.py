"""The whole way: a model in, a folder out that stock runtimes can serve."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import fx

from rolora_passes.add_lora import AddLoRA
from rolora_passes.errors import LoweringError
from rolora_passes.export.executorch import LoweringReport, require_methods, to_executorch
from rolora_passes.export.extras import require
from rolora_passes.export.kv_cache import require_context
from rolora_passes.export.onnx import Flavor, OnnxReport, write_onnx
from rolora_passes.export.tokenizers import require_tokenizer, save_tokenizer
from rolora_passes.graphs.accounting import Weights, weigh
from rolora_passes.graphs.adapters import load_adapter
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.files import writing_folder
from rolora_passes.graphs.rotations import save_rotations
from rolora_passes.manager import Record, apply_passes, check_order, history, require_calibration
from rolora_passes.models import load_model
from rolora_passes.passes import Calibration, Pass
from rolora_passes.recipes import dump_recipe, load_recipe, settled
from rolora_passes.version import versions

Target = Literal["executorch", "onnx"]
Check = Callable[[fx.GraphModule, fx.GraphModule, Path, Any], list[dict[str, Any]]]
"""(captured graph, graph as lowered, folder with the programs, tokenizer) -> rows of a table."""
_NEEDS = {"executorch": "executorch.version", "onnx": "onnx_ir"}


@dataclass(frozen=True)
class Compiled:
    """What `compile_model` wrote and what it measured on the way.

    Attributes:
        lowerings: by target.
        parity: what `check` returned.
        notes: what users should know, such as texts that a runtime's tokenizer reads otherwise.
    """

    folder: Path
    weights: Weights
    history: list[Record]
    lowerings: dict[str, LoweringReport | OnnxReport]
    parity: list[dict[str, Any]]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)


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
    printing: Mapping[str, Any] | None = None,
    check: Check | None = None,
) -> Compiled:
    """Load, capture, transform and lower a model to `folder`, which appears whole or not at all.

    The folder holds `model.pte`, or `model.onnx` with its data and `genai_config.json`, or both; the
    tokenizer, `recipe.yaml`, `manifest.json` (versions, what every pass did, the census of every lowering),
    and `R.bin` and `rotations.json` where the recipe rotates.

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
        printing: what `apply_passes` is to print and to keep of failures: its arguments by name.
        check: called with the finished programs, to compare them; its rows go into the manifest.

    Raises:
        LoweringError: an unknown target, a length below 16, adapters for ONNX alone or named as no method
            can be, or a graph that cannot be lowered.
        FileExistsError: `folder` is something else than a compiled folder.
        MissingExtraError: what writes a target's programs is not installed.
        Also what `load_model`, `load_recipe`, `capture` and `apply_passes` raise. All that can be known
        before the model is loaded is checked before.
    """
    require_context(max_length)
    _require_targets(targets)
    _require_adapters(adapters := adapters or {}, targets)
    passes = load_recipe(recipe, seed)
    check_order(passes, ["canonical"])
    if calibration is None:
        require_calibration(passes, None)
    _require_replaceable(Path(folder))
    notes = require_tokenizer(source, targets)
    seconds: dict[str, float] = {}

    def stage(name: str) -> _Clock:
        if on_stage:
            on_stage(name)
        return _Clock(seconds, name)

    with writing_folder(folder) as temporary:
        with stage("load"):
            model, tokenizer = load_model(source)
        with stage("capture"):
            captured = capture(model)
            del model
        with stage("passes"):
            data = calibration(tokenizer) if calibration is not None else None
            graph = apply_passes(
                captured, passes, verify=verify, calibration=data, on_pass=on_pass, **(printing or {})
            )
            methods = {
                name: apply_passes(graph, [AddLoRA(adapter=adapter)], verify=verify, on_pass=on_pass)
                for name, adapter in adapters.items()
            }
        lowerings: dict[str, LoweringReport | OnnxReport] = {}
        lower: dict[Target, Callable[[], LoweringReport | OnnxReport]] = {
            "executorch": lambda: to_executorch(
                graph,
                temporary / "model.pte",
                max_length=max_length,
                fast_prefill=fast_prefill,
                methods=methods,
            ),
            "onnx": lambda: write_onnx(
                graph, temporary, flavor, max_length=max_length, accuracy_level=accuracy_level
            ),
        }
        for target in dict.fromkeys(targets):
            with stage(f"lower to {target}"):
                lowerings[target] = lower[target]()
        save_tokenizer(source, tokenizer, temporary)
        _keep_inputs(temporary, graph, passes, adapters)
        compiled = Compiled(Path(folder), weigh(graph), history(graph), lowerings, [], seconds, notes)
        manifest = temporary / "manifest.json"
        known = _manifest(source, graph.meta.get("config", {}), compiled, max_length)
        manifest.write_text(json.dumps(known, indent=1), "utf-8")
        if check is not None:
            with stage("compare"):
                compiled.parity.extend(check(captured, graph, temporary, tokenizer))
            manifest.write_text(json.dumps(known | {"parity": compiled.parity}, indent=1), "utf-8")
    return compiled


def _keep_inputs(
    folder: Path, graph: fx.GraphModule, passes: Sequence[Pass], adapters: Mapping[str, str | Path]
) -> None:
    """Put beside the programs what they were made of: the recipe, adapters, rotations."""
    for name, adapter in adapters.items():
        shutil.copytree(adapter, folder / "adapters" / name)
    kept = _with_adapters(settled(passes, "rotations.json"), folder)
    (folder / "recipe.yaml").write_text(dump_recipe(kept), "utf-8")
    if graph.meta.get("rotations"):
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


def _require_targets(targets: Sequence[str]) -> None:
    unknown = [t for t in targets if t not in get_args(Target)]
    if unknown or not targets:
        raise LoweringError(
            f"expected targets of {', '.join(get_args(Target))}, found {', '.join(unknown) or 'none'}"
        )
    for target in targets:
        require(_NEEDS[target], target)


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
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(time.perf_counter() - self.start, 2)


def _manifest(source: str, config: dict[str, Any], compiled: Compiled, max_length: int) -> dict[str, Any]:
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
        "notes": compiled.notes,
    }


def _figures(report: LoweringReport | OnnxReport) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name != "path"}
