"""Instruction data becomes packed windows in which only answers are predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import save_checkpoint

from rolora_passes.errors import DataError
from rolora_passes.instructions import instruction_windows
from rolora_passes.models import load_model

ROWS = [
    {"instruction": f"what is a {word}?", "input": "" if i % 2 else "in short", "output": f"the {word} is it"}
    for i, word in enumerate(["model", "graph", "pass", "weight", "site", "basis", "norm", "head"])
]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(str(save_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")))[1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "instructions.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.mark.parametrize("template", [None, CHAT])
def test_answers_alone_are_predicted(template: str | None, data: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    tokens, labels = instruction_windows(data, tokenizer, 16)
    assert tokens.shape == labels.shape and tokens.shape[1] == 16
    predicted = labels != -100
    assert bool((labels[predicted] == tokens[predicted]).all())
    assert 0.04 < float(predicted.float().mean()) < 0.9
    answers = sum(len(tokenizer(row["output"], add_special_tokens=False)["input_ids"]) for row in ROWS)
    total = int(predicted.sum())
    assert answers - 16 <= total <= answers + 4 * len(ROWS)  # the last window is left out; ends are predicted
    text = tokenizer.decode(tokens.flatten()[predicted.flatten()])
    assert "the" in text and "what" not in text


def test_nothing_is_padded_and_a_seed_shuffles(data: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    tokens, _ = instruction_windows(data, tokenizer, 8, seed=1)
    again, _ = instruction_windows(data, tokenizer, 8, seed=1)
    other, _ = instruction_windows(data, tokenizer, 8, seed=2)
    whole, _ = instruction_windows(data, tokenizer, 1, seed=1)
    assert bool((tokens == again).all()) and not bool((tokens == other).all())
    assert tokens.flatten().tolist() == whole.flatten().tolist()[: tokens.numel()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected instructions in .* found none"),
        ("{", "line 1 of .* is not JSON"),
        (
            '{"instruction": "a"}',
            'expected "instruction" and "output" .* in line 1 .* found the fields instruction',
        ),
        ('{"instruction": "a", "output": 3}', "that hold strings in line 1"),
        ('{"instruction": "a", "output": "b"}', "expected 5000 tokens or more"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        instruction_windows(path, tokenizer, 5000)
    with pytest.raises(DataError, match=r"expected instructions in a \.jsonl file"):
        instruction_windows(tmp_path / "none.jsonl", tokenizer)
