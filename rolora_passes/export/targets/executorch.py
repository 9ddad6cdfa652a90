"""ExecuTorch: `model.pte`, with XNNPACK's kernels, for phones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

from rolora_passes.errors import RunError, one_line
from rolora_passes.export.executorch import runner
from rolora_passes.export.executorch.lower import LoweringReport, require_methods, to_executorch
from rolora_passes.export.target import Encode, Score, Target


@dataclass(frozen=True)
class ExecuTorch(Target):
    """`model.pte`, which the stock runner drives; see `to_executorch`."""

    name: ClassVar[str] = "executorch"
    program: ClassVar[str] = "model.pte"
    needs: ClassVar[tuple[str, ...]] = ("executorch.version",)
    extra: ClassVar[str] = "executorch"
    has_methods: ClassVar[bool] = True

    fast_prefill: bool = field(default=False, metadata={"help": "attend in XNNPACK in calls from position 0"})

    def require_methods(self, names: Iterable[str]) -> None:
        require_methods(names)

    def lower(
        self,
        graph: fx.GraphModule,
        folder: Path,
        *,
        max_length: int,
        methods: Mapping[str, fx.GraphModule] | None = None,
        check: bool = True,
    ) -> LoweringReport:
        return to_executorch(
            graph,
            folder / self.program,
            max_length=max_length,
            fast_prefill=self.fast_prefill,
            methods=methods,
            check=check,
        )

    def score(self, folder: Path) -> Score:
        program = folder / self.program
        forward = runner.load_pte(program)

        def call(tokens: Tensor, position: int) -> Tensor:
            try:
                return forward(tokens.contiguous(), torch.tensor([position]))
            except RuntimeError as error:
                raise RunError(
                    f"the runtime failed on {program} at position {position}: {one_line(error)}"
                ) from error

        return call

    def run(
        self,
        folder: Path,
        prompt: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
        begin: int = 0,
    ) -> str:
        program = folder / self.program
        given = (prompt, max_new_tokens, temperature, on_text, begin)
        try:
            return runner.generate(program, folder / "tokenizer.json", *given)
        except RuntimeError as error:  # the runner's own
            raise RunError(f"the runner failed on {program}: {error}; its log is above") from error

    def encode(self, folder: Path) -> Encode:
        return runner.encoder(folder)


TARGET = ExecuTorch
