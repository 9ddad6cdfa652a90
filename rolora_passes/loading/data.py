"""Text for calibration and perplexity: where it comes from, and how it becomes tokens.

The protocol is that of GPTQ, QuaRot and SpinQuant: documents are joined by an empty line, tokenised once as
one text, and cut into windows that pay no heed to where a document ends. WikiText's documents are its rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora_passes.errors import DataError, one_line
from rolora_passes.extras import require
from rolora_passes.loading.chats import examples, turns_of
from rolora_passes.loading.tokens import beginning

HUB = "hub:"


Written = Callable[[dict[str, Any], str], list[str]]
"""(a line of conversations, where it stands) -> its texts."""


def load_text(source: str | Path, written: Written | None = None) -> list[str]:
    """The documents of a text source, in order.

    Args:
        source: a `.txt` file, which is one document; a `.jsonl` file, whose lines are objects with a field
            "text", or conversations as `rolora_passes.loading.chats` has them; or a data set of the
            Hugging Face hub with a column "text", written
            `hub:Salesforce/wikitext/wikitext-2-raw-v1:test` (name, configuration, split).
        written: writes conversations as text; without it, they are refused.

    Raises:
        DataError: nothing there, not text of that form, or nothing in it.
        MissingExtraError: a hub data set, and `datasets` is not installed.
    """
    texts = _hub(str(source)) if str(source).startswith(HUB) else _file(Path(source).expanduser(), written)
    if not any(text.strip() for text in texts):
        raise DataError(f"expected text in {source}, found none")
    return texts


def token_stream(texts: list[str], tokenizer: Any) -> Tensor:
    """The tokens int64 [n] of documents joined by "\\n\\n" and tokenised once.

    Special tokens are what the tokenizer adds to one text by itself: where that is BOS (Llama, Gemma), the
    stream begins with it. `cut_windows` has every window begin so.
    """
    found = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    return torch.tensor(found, dtype=torch.int64)


def calibration_tokens(
    source: str | Path, tokenizer: Any, samples: int = 128, length: int = 2048, seed: int = 0
) -> Tensor:
    """Windows int64 [samples, length] that start at random in a text's token stream, as GPTQ draws them.

    Starts are drawn independently, so windows may overlap; in a text of few windows they do. Every window
    begins with what the tokenizer begins a text with.

    Raises:
        DataError: fewer tokens than one window has, or what `load_text` raises.
    """
    return random_windows(
        token_stream(load_text(source, conversations(tokenizer)), tokenizer),
        samples,
        length,
        seed,
        str(source),
        beginning(tokenizer),
    )


def random_windows(
    stream: Tensor, samples: int, length: int, seed: int, source: str, begin: Sequence[int] = ()
) -> Tensor:
    """Windows int64 [samples, length] of a stream [n], the same for the same seed; see `cut_windows`."""
    if samples < 1 or length < 1:
        raise DataError(f"expected at least 1 sample of at least 1 token, found {samples} of {length}")
    if len(stream) < length:
        raise DataError(
            f"expected a text of at least one window, {length} tokens, found {len(stream)} in {source}: "
            "give more text, or a smaller length (--length)"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - length + 1, (samples,), generator=generator)
    return cut_windows(stream, starts, length, begin)


def cut_windows(stream: Tensor, starts: Tensor, length: int, begin: Sequence[int] = ()) -> Tensor:
    """Windows int64 [N, length] of a stream [n] that begins as the tokenizer begins a text.

    A model is trained on texts that begin so, and many are lost without: Gemma 3's perplexity doubles. Each
    window is `begin`, then the stream from its start on.

    Args:
        starts: int64 [N], places in the stream.
        begin: BOS, for most models, or nothing: `rolora_passes.loading.tokens.beginning`.
    """
    own = len(begin)
    head = torch.tensor(begin, dtype=torch.int64).expand(len(starts), own)
    return torch.cat((head, stream[starts[:, None] + torch.arange(own, length)]), dim=1)


def _file(path: Path, written: Written | None) -> list[str]:
    if not path.is_file():
        raise DataError(f"expected a text file at {path}, found nothing")
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"expected a .txt or .jsonl file, or {HUB}NAME/CONFIGURATION:SPLIT, found {path}")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error
    if path.suffix == ".txt":
        return [text]
    rows = [(row, f"line {number} of {path}") for number, row in read_lines(text, path)]
    chats = written is not None and any({"messages", "instruction"} & row.keys() for row, _ in rows)
    return [
        text
        for row, where in rows
        for text in (written(row, where) if chats and written else [_document(row, where)])
    ]


def conversations(tokenizer: Any = None) -> Written:
    """Writes conversations in a tokenizer's chat template; without a tokenizer, checks that they are some."""
    if tokenizer is None:
        return lambda row, where: [turn["content"] for turn in turns_of(row, where)]
    return lambda row, where: ["".join(t for t, _ in pieces) for pieces in examples(row, tokenizer, where)]


def read_lines(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines text, with their line numbers.

    Raises:
        DataError: a line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"expected an object in line {number} of {path}, found {line.strip()[:60]}")
        rows.append((number, row))
    return rows


def _document(row: dict[str, Any], where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        found = f"the fields {', '.join(row) or '(none)'}" if "text" not in row else f"{text!r:.60}"
        raise DataError(f'expected a field "text" that holds a string in {where}, found {found}')
    return text


def _hub(source: str) -> list[str]:
    place, _, split = source.removeprefix(HUB).partition(":")
    *name, configuration = place.split("/")
    if not (split and configuration and all(name) and 1 <= len(name) <= 2):
        raise DataError(
            f"expected {HUB}NAME/CONFIGURATION:SPLIT, such as "
            f"{HUB}Salesforce/wikitext/wikitext-2-raw-v1:test, found {source} (a data set without "
            'configurations has one that is named "default")'
        )
    datasets = require("datasets", "eval")
    try:
        rows = datasets.load_dataset("/".join(name), configuration, split=split)
    except Exception as error:  # whatever the hub's client raises
        raise DataError(
            f"cannot load configuration {configuration!r}, split {split!r} of {'/'.join(name)} from the hub: "
            f"{one_line(error)}; check the name, or give a .txt or .jsonl file"
        ) from error
    if "text" not in rows.column_names:
        raise DataError(f'expected a column "text" in {source}, found {", ".join(rows.column_names)}')
    return list(rows["text"])
