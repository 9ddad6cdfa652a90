"""Instruction data becomes packed windows in which only answers are predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import save_checkpoint

from rolora_passes.errors import DataError
from rolora_passes.loading.instructions import instruction_windows
from rolora_passes.loading.models import load_model

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
            'expected "messages", or "instruction" and "output" .* in line 1 .* found the fields instruction',
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


TURNS = [
    {"role": "user", "content": "what is a model?"},
    {"role": "assistant", "content": "<think>hm</think>a thing"},
    {"role": "user", "content": "and a graph?"},
    {"role": "assistant", "content": "another"},
]
# R1's distillates: a prompt ends in an opened thought, which finished turns leave out.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}<Assistant>"
    "{{ m.content.split('</think>')[-1] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
# Qwen3: thoughts of the last turn alone are kept, and an answer without one gets an empty one.
QWEN3 = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}"
    "{% if '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHAT, ["<think>hm</think>a thing</s>", "another</s>"]),
        (R1, ["a thing<end>", "another<end>"]),
        (QWEN3, ["<think>hm</think>a thing<end>", "<think>\n\n</think>\n\nanother<end>"]),
    ],
)
def test_every_answer_of_a_conversation_is_predicted(
    template: str, answers: list[str], tmp_path: Path, tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": TURNS}))
    tokens, labels = (part.flatten() for part in instruction_windows(path, tokenizer, 1))
    predicted = labels != -100
    assert tokenizer.decode(tokens[predicted]) == "".join(answers)
    prompt = tokenizer.decode(tokens[~predicted])
    assert "what is a model?" in prompt and "and a graph?" in prompt and "another" not in prompt


def test_a_template_that_raises_says_its_words(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('a system message must come first') }}"
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": TURNS}))
    with pytest.raises(
        DataError, match=r"refuses turns of user: .*a system message must come first, in line 1"
    ):
        instruction_windows(path, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match='a tokenizer with a chat template for the "messages" in line 1'):
        instruction_windows(path, tokenizer)


@pytest.mark.parametrize("messages", [[], "x", [{"role": "user"}], TURNS[:1]])
def test_messages_that_are_none(messages: Any, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=r'expected "messages" .* line 1'):
        instruction_windows(path, tokenizer)
