"""README's tables of what is supported say what the package does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, ENCODERS, FULL, SEQ2SEQ, tiny_wide
from helpers import captured
from pages import ROOT

from rolora_passes.errors import LoweringError, RoloraError
from rolora_passes.export import to_executorch, to_onnx
from rolora_passes.graphs import capture

README = (ROOT / "README.md").read_text("utf-8")
TABLE = README.partition("| models |")[2].partition("\n\n")[0]
VARIANTS = ("-tied", "-bare", "-classifier")


def key(name: str) -> str:
    """Gemma 2 and gemma2, GPT-NeoX and gpt_neox are one name."""
    for variant in VARIANTS:
        name = name.removesuffix(variant)
    return re.sub(r"[\s_-]", "", name).lower()


def row(kind: str) -> tuple[set[str], list[str]]:
    """The architectures of a row, and its cells for targets."""
    (line,) = (line for line in TABLE.splitlines() if line.startswith(f"| {kind}:"))
    names, _, *targets = (cell.strip() for cell in line.strip("| ").split("|"))
    return {key(name) for name in names.partition(":")[2].split(",")}, targets


@pytest.mark.parametrize(
    ("kind", "tested"),
    [("decoders", CONFIGS), ("encoders", ENCODERS), ("encoders with a decoder", SEQ2SEQ)],
    ids=["decoders", "encoders", "seq2seq"],
)
def test_the_architectures_are_those_of_the_tests(kind: str, tested: dict[str, object]) -> None:
    assert row(kind)[0] == {key(name) for name in tested}


@pytest.mark.parametrize("name", CONFIGS if FULL else ["llama", "gpt2", "mixtral"])
def test_decoders_compile_for_both_targets(name: str, tmp_path: Path) -> None:
    assert row("decoders")[1] == ["yes", "yes"]
    graph = captured(name, torch.float32)
    to_executorch(graph, tmp_path / "model.pte", max_length=32)
    to_onnx(graph, tmp_path / "folder", "portable", max_length=32)


@pytest.mark.parametrize("name", [*ENCODERS, *SEQ2SEQ] if FULL else ["bert", "bart"])
def test_encoders_compile_for_one(name: str, tmp_path: Path) -> None:
    for kind in ("encoders", "encoders with a decoder"):
        assert row(kind)[1] == ["no", "portable"]
    graph = captured(name, torch.float32)
    to_onnx(graph, tmp_path / "folder", "portable", max_length=32)
    with pytest.raises(RoloraError, match="decoder"):
        to_executorch(graph, tmp_path / "model.pte")
    with pytest.raises(RoloraError):
        to_onnx(graph, tmp_path / "ort", "ort")


TYPES = README.partition("| weights captured in |")[2].partition("\n")[0]
LOWERED, REFUSED = (re.findall(r"\w*float\d+", part) for part in TYPES.split(";"))


def test_every_type_is_named() -> None:
    assert sorted(LOWERED + REFUSED) == ["bfloat16", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", LOWERED if FULL else ["bfloat16"])
def test_types_that_compile(dtype: str, tmp_path: Path) -> None:
    graph = capture(tiny_wide(getattr(torch, dtype)))
    to_onnx(graph, tmp_path / "folder", max_length=32)
    to_executorch(graph, tmp_path / "model.pte", max_length=32)


@pytest.mark.parametrize("dtype", REFUSED)
def test_types_that_do_not(dtype: str, tmp_path: Path) -> None:
    graph = capture(tiny_wide(getattr(torch, dtype)))
    with pytest.raises(LoweringError, match="convert it first"):
        to_onnx(graph, tmp_path / "folder")
    with pytest.raises(LoweringError, match="convert it first"):
        to_executorch(graph, tmp_path / "model.pte")
