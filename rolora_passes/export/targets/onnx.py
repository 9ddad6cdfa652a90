"""ONNX: `model.onnx` and its data, for ONNX Runtime and onnxruntime-genai, or any runtime of the standard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

from torch import fx

from rolora_passes.export.onnx import runner
from rolora_passes.export.onnx.lower import Flavor, OnnxReport, require_options, write_onnx
from rolora_passes.export.target import Encode, Score, Target


@dataclass(frozen=True)
class Onnx(Target):
    """`model.onnx`, with `genai_config.json`, by which onnxruntime-genai knows it; see `to_onnx`.

    Raises:
        LoweringError: an option that is none of those listed.
    """

    name: ClassVar[str] = "onnx"
    program: ClassVar[str] = "model.onnx"
    needs: ClassVar[tuple[str, ...]] = ("onnx_ir",)
    extra: ClassVar[str] = "onnx"

    flavor: Flavor = field(
        default="ort",
        metadata={
            "help": "ONNX Runtime's kernels, or the standard's operators alone",
            "choices": get_args(Flavor),
        },
    )
    accuracy_level: Literal[0, 4] | None = field(
        default=None,
        metadata={
            "help": "4 computes quantized linears in int8 (default: 4 if activations are quantized)",
            "choices": (0, 4),
        },
    )

    def __post_init__(self) -> None:
        require_options(self.flavor, self.accuracy_level)

    def lower(
        self,
        graph: fx.GraphModule,
        folder: Path,
        *,
        max_length: int,
        methods: Mapping[str, fx.GraphModule] | None = None,
        check: bool = True,
    ) -> OnnxReport:
        level = self.accuracy_level
        return write_onnx(
            graph, folder, self.flavor, max_length=max_length, accuracy_level=level, check=check
        )

    def score(self, folder: Path) -> Score:
        return runner.OnnxProgram(folder)

    def run(
        self,
        folder: Path,
        prompt: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
        begin: int = 0,
    ) -> str:
        return runner.generate(folder, prompt, max_new_tokens, temperature, on_text, begin)

    def encode(self, folder: Path) -> Encode:
        return runner.encoder(folder)


TARGET = Onnx
