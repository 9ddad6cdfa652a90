"""A program that does not compute what its graph does is not left; one that does is told with its
distance."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_wide
from tiny_llama import tiny_llama
from torch import fx

from rolora_passes import apply_passes
from rolora_passes.errors import LoweringError, MissingExtraError
from rolora_passes.export import to_executorch, to_onnx
from rolora_passes.export.checking import EXACT
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.export.onnx.runner import OnnxProgram
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.dtypes import convert
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error

FORMS: dict[str, dict[str, Any]] = {
    "float": {"window": 4},
    "quantized": {"window": 4, "weights": 4, "table": 8},
}


def change(graph: fx.GraphModule, operator: str, name: str, value: Any) -> None:
    """Another argument for all calls of an operator."""
    for node in graph.graph.nodes:
        if is_op(node, operator):
            names = [a.name for a in node.target._schema.arguments]
            node.update_arg(names.index(name), value)
    graph.recompile()


PLANTED: dict[str, tuple[str, str, Any]] = {
    "a window off by one": ("attention", "window", 5),
    "no window": ("attention", "window", None),
    "another pairing of channels": ("rotary_embedding", "interleaved", True),
    "another scale": ("attention", "scale", 0.2),
}


@pytest.mark.parametrize(
    ("target", "planted", "form"),
    [
        ("executorch", "a window off by one", "float"), ("executorch", "a window off by one", "quantized"),
        ("executorch", "another pairing of channels", "quantized"), ("ort", "a window off by one", "float"),
        ("ort", "no window", "quantized"), ("portable", "a window off by one", "quantized"),
        ("portable", "another scale", "float"),
    ],
)  # fmt: skip
def test_a_wrong_program_is_not_left(
    target: str, planted: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowering sees another graph than the check."""
    graph = tiny_llama(layers=1, **FORMS[form])
    module = "executorch" if target == "executorch" else "onnx"
    fuse = import_module(f"rolora_passes.export.{module}.lower").fuse_heads

    def wrong(prepared: fx.GraphModule) -> None:
        change(prepared, *PLANTED[planted])
        fuse(prepared)

    monkeypatch.setattr(f"rolora_passes.export.{module}.lower.fuse_heads", wrong)
    with pytest.raises(
        LoweringError, match=r"does not compute what its graph does: after .* logits differ by"
    ):
        if target == "executorch":
            to_executorch(graph, tmp_path / "model", max_length=32)
        else:
            to_onnx(graph, tmp_path / "model", target, max_length=32)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    if target == "executorch" and form == "float":
        to_executorch(graph, tmp_path / "model", max_length=32, check=False)
        assert (tmp_path / "model").is_file()


@pytest.mark.parametrize("form", FORMS)
def test_a_right_one_is_told_with_its_distance(form: str, tmp_path: Path) -> None:
    graph = tiny_llama(layers=1, **FORMS[form])
    pte = to_executorch(graph, tmp_path / "a.pte", max_length=32, methods={"other": graph}, last_token=False)
    onnx = [to_onnx(graph, tmp_path / f, f, max_length=32) for f in ("ort", "portable")]  # type: ignore[arg-type]
    assert [c.name for c in pte.checks] == ["forward", "other"]
    for check in [c for report in (pte, *onnx) for c in report.checks]:
        assert check.tokens == 16 and check.error <= check.bound
        assert (check.bound == EXACT) == (form == "float")
        assert check.error < 1e-5 or form == "quantized"
    assert any("logits of 16 tokens, prompt and decoded" in row for row in pte.rows())


def test_one_method_that_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny_llama(layers=1)
    change(other, "attention", "scale", 0.7)
    import rolora_passes.export.executorch.lower as lowering

    prepare = lowering._prepare

    def wrong(graph: fx.GraphModule, *options: Any, **more: Any) -> fx.GraphModule:
        change(graph, "attention", "scale", 0.25)
        return prepare(graph, *options, **more)

    monkeypatch.setattr(lowering, "_prepare", lambda g, *a, **k: wrong(lowering.copy_graph(g), *a, **k))
    with pytest.raises(LoweringError, match=r"^other was written, but"):
        to_executorch(tiny_llama(layers=1), tmp_path / "m.pte", max_length=32, methods={"other": other})
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed.*rolora-passes\[onnx\]"):
        to_onnx(tiny_llama(layers=1), tmp_path / "m", max_length=32)
    to_onnx(tiny_llama(layers=1), tmp_path / "m", max_length=32, check=False)


# What is done to a graph before it is lowered


@pytest.mark.parametrize("residual", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_first_lines_of_the_readme(residual: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_wide()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    graph = apply_passes(capture(model), ["fuse-norm", {"rotate": {"residual": residual}}, "add-lora"])
    report = to_executorch(graph, tmp_path / "model.pte", max_length=32, methods={"again": graph})
    assert not any("mm" in name for name in report.operators)  # no product with the whole table at run time
    to_onnx(graph, tmp_path / "model", max_length=32)
    tokens = torch.arange(9)[None]
    expected = run(graph, tokens)[:, -1]
    for found in (
        load_pte(tmp_path / "model.pte")(tokens, torch.tensor([0])),
        OnnxProgram(tmp_path / "model")(tokens, 0),
    ):
        assert relative_error(found[:, -1], expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    graph, tokens = convert(tiny_llama(layers=1), dtype), torch.arange(9)[None]
    expected = run(convert(graph, torch.float32), tokens)[:, -1]
    to_executorch(graph, tmp_path / "model.pte", max_length=32)
    assert (
        relative_error(load_pte(tmp_path / "model.pte")(tokens, torch.tensor([0]))[:, -1], expected) <= 1e-5
    )
    to_onnx(graph, tmp_path / "model", max_length=32)
    assert relative_error(OnnxProgram(tmp_path / "model")(tokens, 0)[:, -1], expected) <= 1e-5


def test_long_contexts_with_windows_plan_little(tmp_path: Path) -> None:
    """A prompt of more tokens than a call takes, in pieces; no table of context x context in file or
    memory."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    graph = tiny_llama(layers=1, window=300)
    report = to_executorch(graph, tmp_path / "model.pte", max_length=8192)
    assert report.checks[0].tokens == 306
    assert report.bytes < 2e6
    program = deserialize_pte_binary((tmp_path / "model.pte").read_bytes()).program
    plan = next(p for p in program.execution_plan if p.name == "forward")
    assert sum(plan.non_const_buffer_sizes) < 32e6
