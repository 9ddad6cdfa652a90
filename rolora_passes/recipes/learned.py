"""A model and a recipe in; what it learned, a recipe that holds that, and an account out."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import fx

from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.errors import PassError
from rolora_passes.extras import require
from rolora_passes.files import writing_folder
from rolora_passes.graphs.bases.rotations import save_rotations
from rolora_passes.learning import processes
from rolora_passes.passes.add_lora import AddLoRA
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.learn_rotation import LearnRotation
from rolora_passes.passes.manager import Record, apply_passes, history, steps
from rolora_passes.passes.registry import make_pass
from rolora_passes.passes.training import Training
from rolora_passes.passes.tune_lora import TuneLoRA
from rolora_passes.recipes import dump_recipe, load_recipe, settled
from rolora_passes.recipes.opening import open_source
from rolora_passes.version import versions


def learn_rotations(
    source: str,
    recipe: str | Path,
    folder: str | Path,
    calibration: Callable[[Any], Calibration],
    **how: Any,
) -> Record:
    """Run a recipe as far as its learn-rotation, and write what it learned.

    The folder then holds `R.bin` (SpinQuant's keys, and those of factors and scales), `rotations.json`,
    `recipe.yaml` (the recipe with what was learned in place of learn-rotation), `losses.csv`, `losses.png`,
    and `learning.json` (options, seconds, memory, orthogonality, versions). Of the processes that torchrun
    starts, the first writes.

    Args:
        calibration: makes what to learn from, with the model's tokenizer.
        how: see `_Training`.

    Returns: learn-rotation's record.

    Raises:
        PassError: a recipe without learn-rotation, or with two.
        FileExistsError: the folder exists, and is not one that this wrote.
        MissingExtraError: matplotlib is not installed.
        Also what `load_model`, `load_recipe`, `capture` and `apply_passes` raise.
    """
    training = _Training(source, recipe, folder, LearnRotation, **how)
    graph = training.run(calibration, None)

    def write(place: Path) -> list[Pass]:
        save_rotations(graph, place)
        return settled(training.passes, "R.bin")

    return training.written(graph, write)


def tune_adapter(
    source: str,
    recipe: str | Path,
    folder: str | Path,
    data: Callable[[Any], Calibration],
    calibration: Callable[[Any], Calibration] | None = None,
    *,
    epochs: float | None = None,
    **how: Any,
) -> Record:
    """Run a recipe as far as its tune-lora or rilq, and write the adapter.

    The folder then holds `adapter` (in PEFT's format, for the model as it was), `recipe.yaml` (the recipe
    with the adapter in place of its training), `losses.csv`, `losses.png`, and `learning.json`.

    Args:
        data: makes what to train on, with the model's tokenizer.
        calibration: makes what passes before the training look at; None: what is trained on.
        epochs: passes over what is not held out, in place of the recipe's steps.
        how: see `_Training`.

    Returns: the training's record.

    Raises:
        PassError: a recipe without tune-lora or rilq, or with two, or without the add-lora that makes its
            branches; weights that branches were taken from, beside which an adapter means nothing (init svd).
        Also what `learn_rotations` raises.
    """
    training = _Training(source, recipe, folder, TuneLoRA, **how)
    made = [step for step in training.passes[: training.end] if isinstance(step, AddLoRA)]
    if len(made) != 1 or made[0].init == "svd":
        raise PassError(
            f"expected a recipe with one add-lora, not of init svd, before its {training.step.name}, "
            f"found {len(made)}{' of init svd' if made else ''} in {recipe}"
        )
    graph = training.run(data, calibration, epochs)

    def write(place: Path) -> list[Pass]:
        save_adapter(graph, place / "adapter", base=Path(source).name)
        kept = [p for p in training.passes if p is not training.step]
        return [AddLoRA(adapter="adapter") if p is made[0] else p for p in kept]

    return training.written(graph, write)


class _Training:
    """A recipe that trains, run as far as that.

    Args:
        kind: the class of the pass that trains.
        changes: options of that pass in place of the recipe's.
        seed: see `load_recipe`.
        verify, on_pass: see `apply_passes`.
        on_stage: called as the work goes on, for progress.
    """

    def __init__(
        self,
        source: str,
        recipe: str | Path,
        folder: str | Path,
        kind: type[Training],
        *,
        changes: Mapping[str, Any] | None = None,
        seed: int | None = None,
        verify: bool = True,
        on_stage: Callable[[str], None] = lambda name: None,
        on_pass: Callable[[Record], None] | None = None,
    ) -> None:
        self.source, self.folder = source, Path(folder)
        self.verify, self.on_stage, self.on_pass = verify, on_stage, on_pass
        self.passes = _changed(load_recipe(recipe, seed), kind, recipe, changes or {})
        self.end = next(i for i, step in enumerate(self.passes) if isinstance(step, kind))
        _require_replaceable(self.folder)
        _pyplot()
        processes.join()

    @property
    def step(self) -> Training:
        """The pass that trains."""
        return cast(Training, self.passes[self.end])

    def run(
        self,
        data: Callable[[Any], Calibration],
        calibration: Callable[[Any], Calibration] | None,
        epochs: float | None = None,
    ) -> fx.GraphModule:
        """Load, capture, and apply the passes up to the training, which reads `data`."""

        def make(tokenizer: Any) -> Calibration:
            self.data = data(tokenizer)
            self.step.windows(self.data)  # refused before the model is loaded, if they are too few
            return self.data if calibration is None else calibration(tokenizer)

        opened = open_source(self.source, self.passes, calibration=make, on_stage=self.on_stage)
        graph, known = opened.graph, opened.calibration
        self.on_stage("passes")
        for applied in steps(graph, self.passes[: self.end], verify=self.verify, calibration=known):
            graph, known = applied.graph, applied.calibration
            if self.on_pass:
                self.on_pass(applied.record)
        assert known is not None
        self.data = dataclasses.replace(self.data, reference=known.reference)
        if epochs is not None:
            self._train_for(epochs)
        how: Any = {"verify": self.verify, "calibration": self.data, "on_pass": self.on_pass}
        return apply_passes(graph, [self.step], **how)

    def _train_for(self, epochs: float) -> None:
        windows = self.step.windows(self.data)
        steps = max(1, round(epochs * (len(windows.tokens) - windows.held) / self.step.batch))
        self.passes[self.end] = dataclasses.replace(self.step, steps=steps)

    def written(self, graph: fx.GraphModule, write: Callable[[Path], list[Pass]]) -> Record:
        """Write the folder: what `write` puts there, the recipe that it returns, and the account."""
        record = history(graph)[-1]
        if processes.rank() == 0:
            with writing_folder(self.folder) as temporary:
                (temporary / "recipe.yaml").write_text(dump_recipe(write(temporary)), "utf-8")
                _write_account(temporary, record, self.source, self.data)
        return record


def _changed(
    passes: Sequence[Pass], kind: type[Training], recipe: str | Path, changes: Mapping[str, Any]
) -> list[Pass]:
    count, name = sum(isinstance(step, kind) for step in passes), kind.name
    if count != 1:
        examples = "spinquant:W4A4KV4, learned:W4A4KV4" if kind is LearnRotation else "rolora:W4A4, lora:W4A4"
        raise PassError(
            f"expected a recipe with one {name}, found {count} in {recipe}: see {examples}, "
            f"or `rolora passes {name}` to write one"
        )
    return [
        make_pass({step.name: {**step.options(), **changes}}) if isinstance(step, kind) else step
        for step in passes
    ]


def _require_replaceable(folder: Path) -> None:
    if folder.exists() and not (folder / "learning.json").is_file():
        raise FileExistsError(f"{folder} exists and holds something else than what was learned")


def _pyplot() -> Any:
    require("matplotlib", "learn").use("Agg")
    return require("matplotlib.pyplot", "learn")


def _write_account(folder: Path, record: Record, source: str, data: Calibration) -> None:
    notes = dict(record.report.notes)
    losses, held = notes.pop("losses"), dict(notes.get("validation", []))
    with (folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "loss", *(["held out"] if held else [])])
        rows.writerows([n, loss, *([held.get(n, "")] if held else [])] for n, loss in enumerate(losses, 1))
    about = {"source": Path(source).name, "options": record.options, "windows": list(data.tokens.shape)}
    figures = {"first": losses[0], "last": losses[-1], "error": record.error, **notes}
    known = {**about, **figures, "trained": record.report.changed, "versions": versions()}
    (folder / "learning.json").write_text(json.dumps(known, indent=1), "utf-8")
    draw_losses(losses, held, folder / "losses.png")


def draw_losses(losses: Sequence[float], held: Mapping[int, float], path: Path) -> None:
    """The loss of every step, its running mean over a tenth of them, and that of what is held out, as a
    picture."""
    pyplot = _pyplot()
    width = max(1, len(losses) // 10)
    means = [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="#9bb7d4", label="every step")
    axes.plot(range(width, len(losses) + 1), means, color="#1f4e79", label=f"mean of {width}")
    if held:
        axes.plot([*held], [*held.values()], color="#c0504d", marker="o", label="held out")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
