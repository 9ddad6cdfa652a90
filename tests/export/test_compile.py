"""From a model folder to programs for two runtimes that say the same, and text from each of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import save_byte_checkpoint

from rolora_passes.cli import main
from rolora_passes.errors import EvaluationError, LoweringError
from rolora_passes.evaluation import ProgramScorer, open_scorer
from rolora_passes.export import compile_model
from rolora_passes.reporting.artefact import artefact_text

PROMPT = "The quick brown fox"
pytestmark = pytest.mark.xdist_group("compile")  # they share two programs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def twin(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "twin"
    command = ["compile", str(checkpoint), "--recipe", "8da4w", "--max-length", "96", "-o", str(folder)]
    assert main([*command, "--target", "executorch", "--target", "onnx"]) == 0
    return folder


def test_both_programs_and_what_each_is(twin: Path) -> None:
    there = {p.name for p in twin.iterdir()}
    assert there >= {"model.pte", "model.onnx", "genai_config.json", "tokenizer.json", "recipe.yaml"}
    manifest = json.loads((twin / "manifest.json").read_text())
    assert list(manifest["targets"]) == ["executorch", "onnx"]
    assert manifest["targets"]["executorch"]["delegates"] == 3
    assert manifest["targets"]["onnx"]["operators"]["com.microsoft::MatMulNBits"] == 11
    assert manifest["targets"]["onnx"]["flavor"] == "ort"


def test_twin_parity(twin: Path) -> None:
    rows = {row["name"]: row for row in json.loads((twin / "manifest.json").read_text())["parity"]}
    assert list(rows) == ["quantized graph", "executorch", "onnx"]
    for name in ("executorch", "onnx"):
        assert rows[name]["kl_graph"] < rows[name]["kl"] / 5
        assert rows[name]["top1_graph"] > 0.9
        assert rows[name]["greedy"] > 8
    assert rows["quantized graph"]["kl_graph"] == 0
    assert {row["tokens"] for row in rows.values()} == {64}
    assert re.search(
        r"on 64 tokens .*\nquantized graph .*\nexecutorch .*\nonnx .*of 16\n", artefact_text(twin)
    )


def spelt(text: str) -> str:
    """Bytes that are no text are dropped by the runtimes and marked by transformers."""
    return "".join(c for c in text if c.isascii() and c.isprintable())


@pytest.mark.parametrize("target", ["executorch", "onnx"])
def test_text_from_either_runtime(
    target: str, twin: Path, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    command = ["run", str(twin), "--target", target, "--prompt", PROMPT, "--max-new-tokens", "8", "--raw"]
    assert main(command) == 0
    scorer, tokenizer = open_scorer(twin, target=target)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    for _ in range(8):
        tokens = torch.cat([tokens, scorer.logits(tokens, tokens.shape[1] - 1)[:, -1].argmax(-1)[None]], 1)
    expected = tokenizer.decode(tokens[0, len(PROMPT) :])
    assert spelt(capfd.readouterr().out) == spelt(expected)
    assert len(spelt(expected)) > 2


def test_a_scorer_for_each_target(twin: Path) -> None:
    first = open_scorer(twin)[0]
    assert isinstance(first, ProgramScorer) and first.target.name == "executorch"
    scorer, _ = open_scorer(twin, target="onnx")
    assert isinstance(scorer, ProgramScorer) and scorer.target.name == "onnx"
    assert scorer.max_length == 96
    tokens = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))
    whole = scorer.logits(tokens)
    assert whole.shape == (1, 20, 257)
    again = scorer.logits(tokens, 15)  # with what the cache has in common
    torch.testing.assert_close(again, whole[:, 15:], atol=1e-4, rtol=1e-3)


def test_perplexity_of_either_program(twin: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    found = {}
    for target in ("executorch", "onnx"):
        command = ["eval", str(twin), "--target", target, "--text", str(tmp_path / "text.txt")]
        assert main([*command, "--window", "32", "-o", str(tmp_path / target)]) == 0
        result = json.loads((tmp_path / target).read_text())
        found[target] = result["perplexity"][0]["value"]
        assert result["program"] == {"executorch": "model.pte", "onnx": "model.onnx"}[target]
    assert found["onnx"] == pytest.approx(found["executorch"], rel=0.02)
    assert found["onnx"] != found["executorch"]


def test_a_program_that_holds_rounded_weights_in_floating_point_says_so(
    checkpoint: Path, tmp_path: Path, rolora: Callable[..., tuple[int, str, str]]
) -> None:
    """XNNPACK has no kernel of 4 bits that reads activations in floating point; ONNX Runtime has."""
    recipe = tmp_path / "w4a16.yaml"
    recipe.write_text("passes: [quantize-weights: {bits: 4, group_size: 32, head: null}, fold-constants]")
    both = ("--target", "executorch", "--target", "onnx", "--max-length", 32, "--no-check")
    status, printed, said = rolora("compile", checkpoint, "--recipe", recipe, *both, "-o", tmp_path / "out")
    assert status == 0, said
    assert printed.count("14 linears with rounded weights stored in float32: no kernel reads them") == 1
    sizes = [(tmp_path / "out" / name).stat().st_size for name in ("model.pte", "model.onnx.data")]
    assert sizes[0] > 2 * sizes[1]


def test_onnx_alone(checkpoint: Path, tmp_path: Path) -> None:
    compiled = compile_model(str(checkpoint), "float", tmp_path / "out", targets=("onnx",), flavor="portable")
    assert not (tmp_path / "out/model.pte").exists()
    assert compiled.lowerings["onnx"].operators["Attention"] == 2
    with pytest.raises(EvaluationError, match=r"expected a program for executorch .* found onnx"):
        open_scorer(tmp_path / "out", target="executorch")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ((), "expected targets of executorch, onnx, found none"),
        (("tflite",), "expected the name of a target, found 'tflite'; there are executorch, onnx"),
        (("onnx", "coreml"), "expected the name of a target, found 'coreml'; there are executorch, onnx"),
    ],
)
def test_unknown_targets(targets: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=message):
        compile_model(str(checkpoint), "float", tmp_path / "out", targets=targets)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["executorch", "onnx"])
def test_prompts_and_the_room_for_them(target: str, twin: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["run", str(twin), "--target", target, "--raw", "--prompt"]
    assert main([*command, "a" * 96]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "the prompt has 96 tokens, and the program holds 96 with the answer: give a shorter" in said
    assert main([*command, "a" * 90]) == 0, "64 new tokens are more than there is room for, and are cut short"
