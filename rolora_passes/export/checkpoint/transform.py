"""The whole way: a model in, a Hugging Face checkpoint of what a recipe made of it out.

A checkpoint is not a `Target`. A target lowers a graph to a program of a runtime, for a context of a fixed
length, and can run and score it. A checkpoint is no program: it holds the parameters of a model whose code
is elsewhere, has no length, and takes the model's own graph beside the one that is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from rolora_passes.adapters.exchange import load_adapter
from rolora_passes.export.checkpoint.card import model_card
from rolora_passes.export.checkpoint.checking import check_checkpoint
from rolora_passes.export.checkpoint.leaving import without
from rolora_passes.export.checkpoint.origin import Origin
from rolora_passes.export.checkpoint.plan import Plan, make_plan
from rolora_passes.export.checkpoint.writing import write_weights
from rolora_passes.export.clock import Clock
from rolora_passes.export.folder import keep_inputs
from rolora_passes.export.preflight import require_files
from rolora_passes.export.tokenizers import save_tokenizer
from rolora_passes.files import writing_folder
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.info import Record, history
from rolora_passes.loading.models import load_tokenizer, source_folder
from rolora_passes.ondisk import spilling
from rolora_passes.passes.add_lora import AddLoRA
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.manager import apply_passes, check_order, require_calibration
from rolora_passes.passes.merge_lora import MergeLoRA
from rolora_passes.passes.registry import PASSES, make_pass
from rolora_passes.recipes.opening import Recipe, load_passes
from rolora_passes.tensor_files import size
from rolora_passes.version import versions

SHARD_SIZE = 5_000_000_000
ABOUT = "transform.json"


@dataclass(frozen=True)
class Transformed:
    """A checkpoint that was written.

    Attributes:
        folder: where it is.
        dtype: of most of its weights.
        bytes: of all its tensors.
        files: of weights.
        left_out: how many of each kind of rounding the graph had and the checkpoint has not.
        untied: whether the head has a table of its own now, and had none before.
        rounding: how far rounding to the files' types moves the graph's logits, relative to the largest; None
            if it was not checked.
        history: a record for every pass.
        seconds: by stage.
    """

    folder: Path
    dtype: torch.dtype
    bytes: int
    files: int
    left_out: Mapping[str, int]
    untied: bool
    rounding: float | None
    history: Sequence[Record]
    seconds: Mapping[str, float]


def transform_model(
    source: str,
    recipe: Recipe,
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
    leave_out: Collection[str] = (),
    check: bool = True,
    seed: int | None = None,
    calibration: Callable[[Any], Calibration] | None = None,
    printing: Mapping[str, Any] | None = None,
    on_stage: Callable[[str], None] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Transformed:
    """Load and capture a model, apply a recipe, and write a checkpoint that transformers loads.

    Args:
        source: a model folder, hub name or `.gguf` file.
        recipe: as `open_source` takes it; None for no passes but those of the adapter.
        adapter: a folder of a PEFT adapter, merged into the weights before anything is rounded.
        seed: for every pass that draws at random, in place of the recipe's.
        calibration: makes calibration data, given the model's tokenizer, if a pass looks at data.
        printing: what `apply_passes` is to do beside its work: its arguments by name.
        on_stage, on_progress: called as the work goes on.
        folder, dtype, shard_size, leave_out, check: see `to_checkpoint`.

    Raises:
        FileExistsError, LoweringError: see `to_checkpoint`.
        RoloraError: what `load_model`, `load_recipe`, `capture` and `apply_passes` raise.
    """
    require_own(Path(folder), source)
    clock = Clock(tell=on_stage)
    passes = _with_adapter(load_passes(recipe, seed), adapter)
    check_order(passes, ["canonical"])
    require_files(passes)
    data = None
    if any(step.needs_calibration for step in passes):
        data = None if calibration is None else calibration(load_tokenizer(source))
        require_calibration(passes, data)
    with clock.step("load and capture"):
        origin = Origin.load(source)
    with clock.step("passes"), spilling(Path(folder).absolute().parent):
        graph = apply_passes(origin.graph, passes, calibration=data, **(printing or {}))
    return to_checkpoint(
        graph,
        folder,
        origin,
        dtype=dtype,
        shard_size=shard_size,
        leave_out=leave_out,
        check=check,
        clock=clock,
        on_progress=on_progress,
    )


def to_checkpoint(
    graph: fx.GraphModule,
    folder: str | Path,
    source: str | Origin,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
    leave_out: Collection[str] = (),
    check: bool = True,
    clock: Clock | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Transformed:
    """Write what passes made of a model as a checkpoint of that model, to `folder`, whole or not at all.

    The weights stand under the model's own names, in safetensors; quantized ones as the values that they
    stand for. A head that differs from the table is untied from it. Beside them are the configuration, the
    tokenizer, what the model says of generation, `recipe.yaml`, `R.bin` and `rotations.json` where the graph
    was rotated, `transform.json`, and a model card. Tensors are evaluated, written and let go one by one.

    Args:
        graph: `forward(tokens, positions)` as passes left it, folded or not; any dtype, on the CPU.
        source: the model that it was captured from: a folder, hub name or `.gguf` file.
        dtype: of the floating-point tensors; None: that which the source's files have, float32 for a GGUF.
        shard_size: bytes of tensors in a file.
        leave_out: of `LEFT_OUT`: what the graph rounds while it runs, and the checkpoint will not.
        check: load the checkpoint with transformers and refuse it if it does not give the graph's logits.
        clock: where to count seconds.
        on_progress: called with what is counted, how many are done, and of how many.

    Raises:
        FileExistsError: `folder` holds something else than a checkpoint of ours, or is the source.
        LoweringError: the graph has what a checkpoint cannot hold (a transform while the model runs, a
            branch, a bias that the model lacks), named with what to do; or the checkpoint does not compute
            what the graph does.
    """
    clock = clock or Clock()
    require_own(Path(folder), source if isinstance(source, str) else source.source)
    if isinstance(source, str):
        with clock.step("load and capture"):
            source = Origin.load(source, dtype_of(graph))
    plain, left = without(graph, leave_out)
    plan = make_plan(plain, source, dtype)
    with writing_folder(folder) as temporary, spilling(temporary.parent):
        with clock.step("write"):
            sums = write_weights(plan, temporary, shard_size, on_progress)
            _save_config(plan, temporary)
            save_tokenizer(source.source, source.tokenizer, temporary)
        rounding = None
        if check:
            with clock.step("check"):
                rounding = check_checkpoint(plan, temporary, sums)
        done = Transformed(
            Path(folder), plan.type, sum(map(size, plan.forms.values())),
            len([*temporary.glob("*.safetensors")]), {k: n for k, n in left.items() if n},
            plan.origin is not source, rounding, history(graph), clock.seconds,
        )  # fmt: skip
        _describe(graph, source, done, temporary)
    return done


def _with_adapter(passes: list[Pass], adapter: str | Path | None) -> list[Pass]:
    """The recipe with an adapter merged in the model's own basis first; in a graph's, once it is rotated."""
    if adapter is None:
        return passes
    merged: list[Pass] = [AddLoRA(adapter=str(adapter)), MergeLoRA()]
    own = load_adapter(adapter).basis is None
    place = 0 if own else next((i for i, step in enumerate(passes) if not step.exact), len(passes))
    return [*passes[:place], *merged, *passes[place:]]


def require_own(folder: Path, source: str) -> None:
    """Refuse to write over anything but a checkpoint that this wrote, and over the model itself.

    Raises:
        FileExistsError: something else is there.
    """
    if folder.exists() and Path(source).expanduser().exists() and folder.samefile(Path(source).expanduser()):
        raise FileExistsError(f"{folder} is the model that the checkpoint is made of; choose another name")
    ours = (folder / ABOUT).is_file()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not a checkpoint of rolora transform; choose another name"
        )


def _save_config(plan: Plan, folder: Path) -> None:
    """The configuration of the model as it is now, and what its source says of generation."""
    model = plan.origin.outline
    model.config.architectures = [type(model).__name__]
    model.config.dtype = plan.type
    model.config.save_pretrained(folder)
    own = source_folder(plan.origin.source)
    if own is not None and (own / "generation_config.json").is_file():
        shutil.copyfile(own / "generation_config.json", folder / "generation_config.json")
    elif model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _describe(graph: fx.GraphModule, origin: Origin, done: Transformed, folder: Path) -> None:
    """Put beside the weights the recipe, the rotations, and what was done in words and figures."""
    passes = [make_pass({r.name: dict(r.options)}) for r in done.history if r.name in PASSES]
    keep_inputs(folder, graph, passes, {})
    about: dict[str, Any] = {
        "source": Path(origin.source).name,
        "dtype": str(done.dtype).removeprefix("torch."),
        "left_out": dict(done.left_out),
        "untied": done.untied,
        "rounding": done.rounding,
        "versions": versions(),
        "passes": [record.row() for record in done.history],
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1), "utf-8")
    (folder / "README.md").write_text(model_card(origin, done), "utf-8")
