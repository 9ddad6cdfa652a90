"""A model and a recipe in; learned rotations, a recipe that holds them, and an account out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rolora_passes.errors import MissingExtraError, PassError
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.files import writing_folder
from rolora_passes.graphs.rotations import save_rotations
from rolora_passes.learning import processes
from rolora_passes.learning.learn_rotation import LearnRotation
from rolora_passes.manager import Record, apply_passes, check_order, history
from rolora_passes.models import load_model
from rolora_passes.passes import Calibration, Pass
from rolora_passes.recipes import dump_recipe, load_recipe, settled
from rolora_passes.registry import make_pass
from rolora_passes.version import versions


def learn_rotations(
    source: str,
    recipe: str | Path,
    folder: str | Path,
    calibration: Callable[[Any], Calibration],
    *,
    changes: Mapping[str, Any] | None = None,
    seed: int | None = None,
    verify: bool = True,
    on_stage: Callable[[str], None] = lambda name: None,
    on_pass: Callable[[Record], None] | None = None,
) -> Record:
    """Run a recipe as far as its learn-rotation, and write what it learned.

    The folder then holds `R.bin` (SpinQuant's keys, and those of factors and scales), `rotations.json`,
    `recipe.yaml` (the recipe with what was learned in place of learn-rotation), `losses.csv`, `losses.png`,
    and `learning.json` (options, seconds, memory, orthogonality, versions). Of the processes that torchrun
    starts, the first writes.

    Args:
        calibration: makes what to learn from, with the model's tokenizer.
        changes: options of learn-rotation in place of the recipe's.

    Returns: learn-rotation's record.

    Raises:
        PassError: a recipe without learn-rotation, or with two.
        FileExistsError: the folder exists, and is not one that this wrote.
        MissingExtraError: matplotlib is not installed.
        Also what `load_model`, `load_recipe`, `capture` and `apply_passes` raise.
    """
    passes = _changed(load_recipe(recipe, seed), recipe, changes or {})
    check_order(passes, ["canonical"])
    _require_replaceable(Path(folder))
    _pyplot()
    processes.join()
    on_stage("loading")
    model, tokenizer = load_model(source)
    on_stage("capturing")
    graph = capture(model)
    data = calibration(tokenizer)
    on_stage("passes")
    end = next(i for i, step in enumerate(passes) if isinstance(step, LearnRotation)) + 1
    graph = apply_passes(graph, passes[:end], verify=verify, calibration=data, on_pass=on_pass)
    record = history(graph)[-1]
    if processes.rank() == 0:
        with writing_folder(folder) as temporary:
            save_rotations(graph, temporary)
            (temporary / "recipe.yaml").write_text(dump_recipe(settled(passes, "R.bin")))
            _write_account(temporary, record, source, data)
    return record


def _changed(passes: Sequence[Pass], recipe: str | Path, changes: Mapping[str, Any]) -> list[Pass]:
    count = sum(isinstance(step, LearnRotation) for step in passes)
    if count != 1:
        raise PassError(
            f"expected a recipe with one learn-rotation, found {count} in {recipe}: see spinquant:W4A4KV4, "
            "learned:W4A4KV4, or `rolora passes learn-rotation` to write one"
        )
    return [
        make_pass({step.name: {**step.options(), **changes}}) if isinstance(step, LearnRotation) else step
        for step in passes
    ]


def _require_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / "learning.json").is_file():
        raise FileExistsError(f"{folder} exists and holds something else than learned rotations")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "matplotlib is not installed: run `pip install rolora-passes[learn]`"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _write_account(folder: Path, record: Record, source: str, data: Calibration) -> None:
    notes = dict(record.report.notes)
    losses = notes.pop("losses")
    with (folder / "losses.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "loss"])
        rows.writerows(enumerate(losses, 1))
    about = {"source": Path(source).name, "options": record.options, "windows": list(data.tokens.shape)}
    figures = {"first": losses[0], "last": losses[-1], "error": record.error, **notes}
    known = {**about, **figures, "trained": record.report.changed, "versions": versions()}
    (folder / "learning.json").write_text(json.dumps(known, indent=1))
    draw_losses(losses, str(record.options.get("loss", "distillation")), folder / "losses.png")


def draw_losses(losses: Sequence[float], name: str, path: Path) -> None:
    """The loss of every step, and its running mean over a tenth of them, as a picture."""
    pyplot = _pyplot()
    width = max(1, len(losses) // 10)
    means = [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="#9bb7d4", label="every step")
    axes.plot(range(width, len(losses) + 1), means, color="#1f4e79", label=f"mean of {width}")
    axes.set(xlabel="step", ylabel=f"{name}, nats per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
