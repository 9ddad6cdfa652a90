"""Text becomes the tokens the papers' protocol asks for, or an error that says what is wrong with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import TEXT, character_tokenizer
from tokenizers import processors

from rolora_passes.errors import DataError, MissingExtraError
from rolora_passes.evaluation.perplexity import split_windows
from rolora_passes.loading.data import (
    calibration_tokens,
    conversations,
    cut_windows,
    load_text,
    random_windows,
    token_stream,
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_documents_of_files(text: Path, tmp_path: Path) -> None:
    assert load_text(text) == [TEXT]
    lines = tmp_path / "text.jsonl"
    lines.write_text('{"text": "one\\u2028two", "id": 1}\n\n{"text": ""}\n{"text": "three"}')
    assert load_text(str(lines)) == ["one\u2028two", "", "three"]


def test_a_stream_is_one_text() -> None:
    tokenizer = character_tokenizer()
    stream = token_stream(["ab", "", "c"], tokenizer)
    assert stream.dtype == torch.int64
    assert tokenizer.decode(stream) == "ab\n\n\n\nc"


def test_what_the_tokenizer_adds_stands_once() -> None:
    tokenizer = character_tokenizer()
    template = processors.TemplateProcessing("~ $A", special_tokens=[("~", tokenizer.eos_token_id)])
    tokenizer._tokenizer.post_processor = template
    plain = tokenizer("~ab\n\nc", add_special_tokens=False).input_ids
    assert token_stream(["ab", "c"], tokenizer).tolist() == plain


def test_windows_are_of_the_text_and_of_the_seed(text: Path) -> None:
    tokenizer = character_tokenizer()
    state = torch.get_rng_state()
    windows = calibration_tokens(text, tokenizer, samples=50, length=20, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "drew from the global generator"
    assert windows.shape == (50, 20) and windows.dtype == torch.int64
    assert all(tokenizer.decode(row) in TEXT for row in windows)
    assert len({tuple(row.tolist()) for row in windows}) > 25
    assert torch.equal(windows, calibration_tokens(text, tokenizer, samples=50, length=20, seed=3))
    assert not torch.equal(windows, calibration_tokens(text, tokenizer, samples=50, length=20, seed=4))


def test_every_start_can_be_drawn(text: Path) -> None:
    tokenizer = character_tokenizer()
    whole = token_stream([TEXT], tokenizer)
    assert torch.equal(calibration_tokens(text, tokenizer, 1, len(whole))[0], whole)
    drawn = calibration_tokens(text, tokenizer, 200, len(whole) - 1)
    assert {tuple(row.tolist()) for row in drawn} == {tuple(whole[:-1].tolist()), tuple(whole[1:].tolist())}


def test_conversations_calibrate(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": turns}, {"instruction": "say", "output": "it"}])))
    window = calibration_tokens(path, tokenizer, 1, 47)
    assert tokenizer.decode(window[0]) == "[user]who?[assistant]me\n\n[user]say[assistant]it"[:47]
    assert load_text(path, conversations()) == ["who?", "me", "say", "it"]


def test_too_little_text(text: Path) -> None:
    with pytest.raises(
        DataError, match=r"one window, 2048 tokens, found 308 in .*text\.txt: give more text, or"
    ):
        calibration_tokens(text, character_tokenizer())
    with pytest.raises(DataError, match="at least 1 sample of at least 1 token, found 0 of 8"):
        calibration_tokens(text, character_tokenizer(), samples=0, length=8)


FILES: dict[str, tuple[str, bytes | None, str]] = {
    "nothing": ("a.txt", None, "expected a text file at .*a.txt, found nothing"),
    "suffix": ("a.csv", b"x", r"expected a \.txt or \.jsonl file, or hub:.*, found .*a.csv"),
    "empty": ("a.txt", b" \n", "expected text in .*a.txt, found none"),
    "no lines": ("a.jsonl", b"", "expected text in .*a.jsonl, found none"),
    "bytes": ("a.txt", b"\xff\xfe", "a.txt is not text in UTF-8"),
    "not JSON": ("a.jsonl", b'{"text": "x"}\n{"text"', "line 2 of .*a.jsonl is not JSON: Expecting"),
    "a list": ("a.jsonl", b"[1]", r"expected an object in line 1 of .*a.jsonl, found \[1\]"),
    "Alpaca": (
        "a.jsonl",
        json.dumps({"instruction": "a", "input": "", "output": "b"}).encode(),
        'expected a field "text" .* in line 1 of .*, found the fields instruction, input, output',
    ),
    "a number": ("a.jsonl", b'{"text": 3}', 'field "text" that holds a string .*, found 3'),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES.keys())
def test_files_that_are_no_text(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(tmp_path / name)


class Hub:
    """Stands for the package `datasets`."""

    def __init__(self, column: str = "text") -> None:
        self.column, self.asked = column, ()

    def load_dataset(self, *arguments: str, split: str) -> Any:
        import datasets

        self.asked = (*arguments, split)
        return datasets.Dataset.from_dict({self.column: [" = A title = \n", "", "A line.\n"]})


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    for source, asked in (
        ("hub:wikitext/wikitext-2-raw-v1:test", ("wikitext", "wikitext-2-raw-v1", "test")),
        ("hub:Salesforce/wikitext/raw:train[:3]", ("Salesforce/wikitext", "raw", "train[:3]")),
    ):
        assert load_text(source) == [" = A title = \n", "", "A line.\n"]
        assert hub.asked == asked
    hub.column = "prompt"
    with pytest.raises(DataError, match='expected a column "text" in hub:a/b:c, found prompt'):
        load_text("hub:a/b:c")
    for source in ("hub:wikitext:test", "hub:a/b", "hub:/b:test", "hub:a/b/c/d:test", "hub:a/b:"):
        with pytest.raises(
            DataError, match="expected hub:NAME/CONFIGURATION:SPLIT, such as .*, found " + source
        ):
            load_text(source)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"cannot load configuration 'b', split 'c' of a from the hub: .*no route; "
    ):
        load_text("hub:a/b:c")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtraError, match=r"datasets is not installed: run `pip install rolora-passes\[eval\]`"
    ):
        load_text("hub:a/b:c")


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    stream = torch.tensor([1, *range(10, 29)])
    starts = torch.tensor([0, 3, 15])
    assert cut_windows(stream, starts, 5, [1]).tolist() == [
        [1, 10, 11, 12, 13], [1, 13, 14, 15, 16], [1, 25, 26, 27, 28],
    ]  # fmt: skip
    assert cut_windows(stream, starts, 5).tolist()[1] == [12, 13, 14, 15, 16]
    windows = split_windows(Endless(), stream, 5, None, [1])
    assert windows[:, 0].tolist() == [1] * 4
    assert windows[:, 1:].flatten().tolist() == list(range(10, 26))  # every token of the text once
    drawn = random_windows(stream, 20, 5, 0, "text", [1])
    assert drawn[:, 0].eq(1).all() and drawn[:, 1:].ge(10).all()


class Endless:
    """What `split_windows` asks of a scorer."""

    max_length = None
    vocabulary = 99
