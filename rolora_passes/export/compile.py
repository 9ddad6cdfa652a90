"""The whole way: a model in, a folder out that a stock runner can serve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolora_passes.export.executorch import LoweringReport, to_executorch
from rolora_passes.export.extras import require
from rolora_passes.export.kv_cache import require_context
from rolora_passes.graphs.accounting import Weights, weigh
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.files import writing_folder
from rolora_passes.graphs.rotations import save_rotations
from rolora_passes.manager import Record, apply_passes, check_order, history, require_calibration
from rolora_passes.models import load_model
from rolora_passes.passes import Calibration
from rolora_passes.recipes import dump_recipe, load_recipe
from rolora_passes.version import versions


@dataclass(frozen=True)
class Compiled:
    """What `compile_model` wrote and what it measured on the way."""

    folder: Path
    weights: Weights
    history: list[Record]
    lowering: LoweringReport
    seconds: dict[str, float]


def compile_model(
    source: str,
    recipe: str | Path,
    folder: str | Path,
    *,
    max_length: int = 512,
    fast_prefill: bool = False,
    verify: bool = True,
    seed: int | None = None,
    calibration: Callable[[Any], Calibration] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_pass: Callable[[Record], None] | None = None,
    printing: Mapping[str, Any] | None = None,
) -> Compiled:
    """Load, capture, transform and lower a model to `folder`, which appears whole or not at all.

    The folder holds `model.pte`, the tokenizer, `recipe.yaml`, `manifest.json` (versions, what every
    pass did, the census of the lowering), and `R.bin` and `rotations.json` where the recipe rotates.

    Args:
        source: a model folder, a hub name, or a `.gguf` file.
        recipe: a recipe's name or file.
        folder: where to write; a compiled folder there is replaced, anything else is not.
        max_length: tokens of context the program holds.
        fast_prefill: see `to_executorch`.
        seed: see `load_recipe`.
        calibration: makes the calibration data of passes that look at data, given the model's tokenizer.
        on_stage, on_pass: called as the work goes on, for progress.
        printing: what `apply_passes` is to print and to keep of failures: its arguments by name.

    Raises:
        LoweringError: a length below 16, or a graph that cannot be lowered.
        FileExistsError: `folder` is something else than a compiled folder.
        MissingExtraError: ExecuTorch is not installed.
        Also what `load_model`, `load_recipe`, `capture` and `apply_passes` raise. All that can be known
        before the model is loaded is checked before.
    """
    require_context(max_length)
    passes = load_recipe(recipe, seed)
    check_order(passes, ["canonical"])
    if calibration is None:
        require_calibration(passes, None)
    _require_replaceable(Path(folder))
    require("executorch.version", "executorch")
    seconds: dict[str, float] = {}

    def stage(name: str) -> _Clock:
        if on_stage:
            on_stage(name)
        return _Clock(seconds, name)

    with writing_folder(folder) as temporary:
        with stage("load"):
            model, tokenizer = load_model(source)
        with stage("capture"):
            graph = capture(model)
            del model
        with stage("passes"):
            data = calibration(tokenizer) if calibration is not None else None
            graph = apply_passes(
                graph, passes, verify=verify, calibration=data, on_pass=on_pass, **(printing or {})
            )
        with stage("lower"):
            lowering = to_executorch(
                graph, temporary / "model.pte", max_length=max_length, fast_prefill=fast_prefill
            )
        tokenizer.save_pretrained(temporary)
        (temporary / "recipe.yaml").write_text(dump_recipe(passes))
        if graph.meta.get("rotations"):
            save_rotations(graph, temporary)
        compiled = Compiled(Path(folder), weigh(graph), history(graph), lowering, seconds)
        manifest = _manifest(source, graph.meta.get("config", {}), compiled, max_length)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return compiled


def _require_replaceable(folder: Path) -> None:
    compiled = (folder / "manifest.json").is_file() and (folder / "model.pte").is_file()
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
    return {
        "source": Path(source).name,
        "target": "executorch",
        "max_length": max_length,
        "config": config,
        "versions": versions(),
        "passes": [record.row() for record in compiled.history],
        "weights": {
            "elements": compiled.weights.elements,
            "bits_per_weight": round(compiled.weights.bits_per_weight, 3),
            "by_bits": compiled.weights.by_bits,
        },
        "lowering": {
            "bytes": compiled.lowering.bytes,
            "cache_bytes": compiled.lowering.cache_bytes,
            "delegates": compiled.lowering.delegates,
            "operators": compiled.lowering.operators,
            "cpu_seconds": compiled.lowering.seconds,
        },
        "seconds": compiled.seconds,
    }
