"""Perplexity is transformers' own loss over windows; graphs and programs are scored alike."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import captured, model_of
from tiny_checkpoint import save_checkpoint
from torch import Tensor

from rolora_passes.errors import DataError, EvaluationError, GraphFormatError, RunError
from rolora_passes.evaluation import (
    GraphScorer,
    ProgramScorer,
    Scorer,
    divergence,
    open_scorer,
    perplexity,
)
from rolora_passes.export import compile_model, to_executorch
from rolora_passes.export.executorch.runner import Forward
from rolora_passes.graphs import convert, save_graph


def stream(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed))


class Fixed(Scorer):
    """Gives the same logits [S, V] whatever it is asked."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.asked = rows, []

    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        self.asked.append(tokens)
        return self.rows[None, start : tokens.shape[1]]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_the_loss_of_transformers(name: str) -> None:
    tokens = stream(16 * 5 + 3)
    found = perplexity(GraphScorer(captured(name)), tokens, window=16)
    losses = []
    for row in tokens[:80].view(5, 1, 16):
        with torch.no_grad():
            losses.append(float(model_of(name)(input_ids=row, labels=row).loss))
    mean = sum(losses) / 5
    assert found.nll == pytest.approx(mean, rel=1e-5)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert (found.tokens, found.windows, found.window) == (75, 5, 16)
    spread = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 4)
    assert found.nll_error == pytest.approx(spread / math.sqrt(5), rel=1e-5)
    assert found.error == pytest.approx(found.value * found.nll_error)


def test_more_rows_than_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, tokens = GraphScorer(captured("llama")), stream(64)
    whole = perplexity(scorer, tokens, window=32)
    apart = divergence(scorer, GraphScorer(captured("llama-tied")), tokens.view(2, 32))
    monkeypatch.setattr(sys.modules["rolora_passes.evaluation.perplexity"], "_ROWS", 7)
    assert perplexity(scorer, tokens, window=32).nll == pytest.approx(whole.nll, rel=1e-12)
    again = divergence(scorer, GraphScorer(captured("llama-tied")), tokens.view(2, 32))
    assert again.kl == pytest.approx(apart.kl, rel=1e-12) and again.agreement == apart.agreement


def test_tail_and_limit() -> None:
    scorer, tokens = GraphScorer(captured("llama")), stream(70)
    whole = perplexity(scorer, tokens, window=16)
    assert perplexity(scorer, tokens[:64], window=16).nll == whole.nll and whole.windows == 4
    done: list[tuple[int, int]] = []
    two = perplexity(scorer, tokens, 16, 2, lambda *at: done.append(at))
    assert two.nll == perplexity(scorer, tokens[:32], 16).nll
    assert done == [(1, 2), (2, 2)]
    assert perplexity(scorer, tokens, 16, limit=99).windows == 4
    one = perplexity(scorer, tokens, 16, limit=1)
    assert one.nll_error is None and one.error is None


def test_uniform_predictions() -> None:
    found = perplexity(Fixed(torch.zeros(9, 50)), stream(27) % 50, window=9)
    assert found.value == pytest.approx(50)
    assert found.nll_error == pytest.approx(0, abs=1e-7)


def test_precision_of_half_logits_is_not_lost() -> None:
    rows = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = stream(27) % 50
    assert perplexity(Fixed(rows), tokens, 9).nll == pytest.approx(
        perplexity(Fixed(rows.double()), tokens, 9).nll
    )


def test_overflow_is_infinite_not_an_error() -> None:
    rows = torch.full((9, 2), -2000.0)
    rows[:, 0] = 0
    assert perplexity(Fixed(rows), torch.ones(9, dtype=torch.int64), 9).value == math.inf


BAD: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "short": (DataError, {"tokens": stream(15)}, "one window, 16 tokens, found 15: .* smaller --window"),
    "empty": (DataError, {"tokens": stream(0)}, "one window, 16 tokens, found 0"),
    "shape": (DataError, {"tokens": stream(64).view(4, 16)}, r"int64 \[n\], found torch.int64 \[4, 16\]"),
    "type": (DataError, {"tokens": torch.ones(64)}, r"found torch.float32 \[64\]"),
    "unknown": (
        DataError,
        {"tokens": stream(64) + 50},
        r"tokens below 97, .*, found 14\d: the tokenizer is of",
    ),
    "long": (
        EvaluationError,
        {"tokens": stream(99), "window": 65},
        r"at most 64 .* found 65: give --window 64",
    ),
    "window": (EvaluationError, {"tokens": stream(64), "window": 1}, r"at least 2 tokens .* found window 1"),
    "limit": (EvaluationError, {"tokens": stream(64), "limit": 0}, "at least 1 of them, found window 16, 0"),
}


@pytest.mark.parametrize(("error", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(error: type[Exception], options: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        perplexity(GraphScorer(captured("llama")), **{"window": 16, **options})


def test_logits_that_are_not_numbers() -> None:
    with pytest.raises(EvaluationError, match="expected finite logits, found NaN or infinite"):
        perplexity(Fixed(torch.full((9, 50), torch.nan)), stream(9) % 50, 9)


def test_divergence() -> None:
    a, b = (GraphScorer(captured(name)) for name in ("llama", "llama-tied"))
    windows = stream(48).view(3, 16)
    itself = divergence(a, a, windows)
    assert (itself.kl, itself.agreement, itself.tokens) == (0, 1, 48)
    with torch.no_grad():
        p, q = (model_of(n)(input_ids=windows).logits for n in ("llama", "llama-tied"))
    expected = torch.nn.functional.kl_div(
        q.log_softmax(-1).flatten(0, 1),
        p.log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    found = divergence(a, b, windows)
    assert found.kl == pytest.approx(float(expected), rel=1e-6)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    with pytest.raises(EvaluationError, match="at most 64"):
        divergence(a, b, stream(65)[None])


# Programs.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def compiled(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("compiled")
    compile_model(str(checkpoint), "float", folder, max_length=32)
    return folder


def test_a_program_equals_its_graph(checkpoint: Path, compiled: Path) -> None:
    program, tokenizer = open_scorer(compiled)
    graph, _ = open_scorer(checkpoint)
    assert isinstance(program, ProgramScorer) and isinstance(graph, GraphScorer)
    assert program.max_length == 32 and program.vocabulary == graph.vocabulary == 97
    assert tokenizer("a\nb").input_ids == open_scorer(checkpoint)[1]("a\nb").input_ids
    tokens = stream(64)
    found, expected = (perplexity(scorer, tokens, window=32) for scorer in (program, graph))
    assert found.nll == pytest.approx(expected.nll, abs=1e-5)
    apart = divergence(graph, program, tokens.view(2, 32))
    assert apart.kl < 1e-10 and apart.agreement == 1
    with pytest.raises(EvaluationError, match=r"at most 32 tokens.* found 33: give --window 32"):
        perplexity(program, stream(33), window=33)


def test_a_programs_cache_serves_the_next_window(compiled: Path, checkpoint: Path) -> None:
    """Whatever was asked before, and from whatever position."""
    program, graph = ProgramScorer(compiled), open_scorer(checkpoint)[0]
    tokens = stream(20)[None]
    other = tokens.clone()
    other[:, 12:] = stream(8, seed=1)
    calls: list[int] = []
    score = program._score
    program._score = lambda t, at: (calls.append(t.shape[1]), score(t, at))[1]
    for asked, start, spent in (
        (tokens, 10, 20),
        (tokens, 15, 5),
        (other, 11, 9),
        (other, 14, 6),
        (other[:, :7], 3, 4),
        (tokens, 0, 20),
        (tokens[:, 1:], 2, 19),
    ):
        found = program.logits(asked, start)
        torch.testing.assert_close(found, graph.logits(asked, start), atol=1e-4, rtol=0)
        assert sum(calls) == spent
        calls.clear()


def test_a_program_of_all_positions(compiled: Path, checkpoint: Path, tmp_path: Path) -> None:
    graph = open_scorer(checkpoint)[0]
    (tmp_path / "manifest.json").write_text((compiled / "manifest.json").read_text())
    to_executorch(graph.graph, tmp_path / "model.pte", max_length=32, last_token=False)
    program, tokens = ProgramScorer(tmp_path), stream(20)[None]
    for start in (9, 0, 19):
        torch.testing.assert_close(
            program.logits(tokens, start), graph.logits(tokens, start), atol=1e-4, rtol=0
        )


def test_a_program_that_fails_is_named(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> Forward:
        def forward(tokens: Tensor, input_pos: Tensor) -> Tensor:
            if tokens.shape[1] != 2:  # what is tried first has two
                raise RuntimeError("method->execute() failed")
            return torch.zeros(1, 1, 97)

        return forward

    with monkeypatch.context() as patch:
        patch.setattr("rolora_passes.export.executorch.runner.load_pte", load)
        program = ProgramScorer(compiled)
    with pytest.raises(
        RunError, match=r"the runtime failed on .*model.pte at position 0: .*execute\(\) failed"
    ):
        program.logits(stream(4)[None])
    manifest = (compiled / "manifest.json").read_text()
    for name, content, message in (
        ("manifest.json", None, "found no manifest.json in"),
        ("manifest.json", "{", "manifest.json is damaged: .*; compile it again"),
        ("manifest.json", "[]", "expected a manifest with max_length in .*: compile it again"),
        ("manifest.json", manifest, "expected model.pte in .*, found none: compile it again"),
        ("model.pte", "not a program", "the runtime refuses .*model.pte: .*; compile it again"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(RunError, match=message):
            ProgramScorer(tmp_path)


# What can be opened.


def test_recipes_and_precisions_are_applied(checkpoint: Path, tmp_path: Path) -> None:
    plain, tokenizer = open_scorer(checkpoint)
    windows = stream(64).view(2, 32)
    passes: list[str] = []
    ready: list[Any] = []
    quantized, _ = open_scorer(
        checkpoint,
        recipe="8da4w",
        ready=lambda *given: ready.append(given),
        on_pass=lambda record: passes.append(record.name),
    )
    assert "quantize-weights" in passes
    assert 1e-4 < divergence(plain, quantized, windows).kl < 10
    assert divergence(plain, ready[0][0], windows).kl == 0 and type(ready[0][1]) is type(tokenizer)
    half, _ = open_scorer(checkpoint, dtype=torch.bfloat16)
    assert half.logits(windows[:1]).dtype == torch.bfloat16
    assert 1e-9 < divergence(plain, half, windows).kl < 1e-1

    path = save_graph(convert(plain.graph, torch.float64), tmp_path / "graph.safetensors")
    saved, words = open_scorer(path, tokenizer=checkpoint)
    assert (
        saved.logits(windows[:1]).dtype == torch.float64
        and words("ab").input_ids == tokenizer("ab").input_ids
    )
    assert divergence(plain, saved, windows).kl < 1e-6
    again, _ = open_scorer(path, tokenizer=checkpoint, dtype=torch.float32, recipe="8da4w")
    assert divergence(quantized, again, windows).kl < 1e-6


def test_an_encoder_has_no_perplexity() -> None:
    with pytest.raises(
        GraphFormatError, match=r"likelihood needs a decoder-only graph, .* found forward\(tokens\)"
    ):
        GraphScorer(captured("bert"))


def test_what_cannot_be_opened(checkpoint: Path, compiled: Path, tmp_path: Path) -> None:
    path = save_graph(captured("llama"), tmp_path / "graph.safetensors")
    strange = tmp_path / "strange"
    strange.mkdir()
    manifest = {**json.loads((compiled / "manifest.json").read_text()), "targets": {"abacus": {}}}
    (strange / "manifest.json").write_text(json.dumps(manifest))
    for source, options, message in (
        (path, {}, "a saved graph has no tokenizer: give --tokenizer FOLDER with .*graph.safetensors"),
        (path, {"target": "onnx"}, "is not compiled, so it has no program: leave --target out"),
        (path, {"tokenizer": tmp_path}, "cannot load a tokenizer from "),
        (compiled, {"recipe": "8da4w"}, "is compiled, and evaluated as it is: leave --recipe out"),
        (compiled, {"dtype": torch.float64}, "is compiled, and evaluated as it is: leave --dtype out"),
        (compiled / "model.pte", {}, "expected the folder that `rolora compile` wrote, found a program"),
        (strange, {}, "expected a program for executorch or onnx in .*strange, found abacus"),
    ):
        with pytest.raises(EvaluationError, match=message):
            open_scorer(source, **options)
