"""What a model is compiled with, and what is known of it on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from rolora_passes.adapters.exchange import load_adapter
from rolora_passes.decoding.kv_cache import require_context
from rolora_passes.errors import LoweringError
from rolora_passes.export.preflight import require_files
from rolora_passes.export.target import TARGETS, Target, loadable_targets
from rolora_passes.passes.base import Calibration, Pass
from rolora_passes.passes.manager import Applied
from rolora_passes.recipes.opening import checked_recipe

Check = Callable[[fx.GraphModule, fx.GraphModule, Path, Any], list[dict[str, Any]]]
"""(captured graph, graph as lowered, folder with the programs, tokenizer) -> rows of a table."""


@dataclass(frozen=True)
class Made:
    """What a recipe made of a model, before it is lowered.

    Attributes:
        captured, graph: before the recipe and after it.
        steps: every pass as it was applied.
        tokenizer: the model's.
        calibration: what the passes were given.
        methods: the graph with each of the adapters, by name.
    """

    captured: fx.GraphModule
    graph: fx.GraphModule
    steps: list[Applied]
    tokenizer: Any
    calibration: Calibration | None
    methods: dict[str, fx.GraphModule] = field(default_factory=dict)


Judge = Callable[[Made], dict[str, Any]]
"""What a recipe made -> what it lost, for the manifest; or it raises, and nothing is lowered."""


@dataclass(frozen=True)
class Order:
    """What is to be compiled, and how; what a glance shows to be impossible is refused.

    Attributes:
        source: a model folder, a hub name, or a `.gguf` file.
        passes: of the recipe.
        targets: each once; the passes are run once for all of them.
        max_length: tokens of context the programs hold.
        adapters: folders of PEFT adapters by name: methods of the `.pte`, beside `forward`, which have what
            the recipe made and this adapter; copies go into `adapters`.
        calibration: makes the calibration data of passes that look at data, given the model's tokenizer.
        run: run what was written, and refuse to leave a program that does not compute what its graph does.
        judge: called with what the passes made, before it is lowered, to say how far it is from the model.
        check: called with the finished programs, to compare them; its rows go into the manifest.
        printing: what `apply_passes` is to do beside its work: its arguments by name.
    """

    source: str
    passes: list[Pass]
    targets: tuple[Target, ...]
    max_length: int
    adapters: Mapping[str, str | Path]
    calibration: Callable[[Any], Calibration] | None
    run: bool
    judge: Judge | None
    check: Check | None
    printing: Mapping[str, Any]

    def __post_init__(self) -> None:
        require_context(self.max_length)
        names = [target.name for target in self.targets]
        if not names:
            raise LoweringError(f"expected targets of {', '.join(TARGETS)}, found none")
        if len({*names}) < len(names):
            raise LoweringError(f"expected every target once, found {', '.join(names)}")
        files = [target.program for target in self.targets]
        if len({*files}) < len(files):
            raise LoweringError(
                f"expected targets that write different files, found {', '.join(names)} that write "
                f"{', '.join(files)}: compile them to two folders"
            )
        for target in self.targets:
            target.require()
        self._require_adapters(names)
        checked_recipe(self.passes, calibration=self.calibration)
        require_files(self.passes)

    def _require_adapters(self, names: Sequence[str]) -> None:
        takers = [target for target in self.targets if target.has_methods]
        if self.adapters and not takers:
            able = " or ".join(cls.name for cls in loadable_targets() if cls.has_methods)
            raise LoweringError(
                f"expected target {able}, whose methods adapters are, found {', '.join(names)}"
            )
        for target in takers:
            target.require_methods(self.adapters)
        for folder in self.adapters.values():
            load_adapter(folder)
