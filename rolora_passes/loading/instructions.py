"""Instruction data: questions with answers become packed windows in which the answers alone are predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora_passes.errors import DataError
from rolora_passes.loading.chats import Pieces, examples
from rolora_passes.loading.data import read_lines
from rolora_passes.loading.tokens import beginning

IGNORED = -100  # what cross-entropy does not count


def instruction_windows(
    source: str | Path, tokenizer: Any, length: int = 1024, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Windows of instructions and answers, one after another without padding, and what is to be predicted.

    Examples are shuffled, written in the tokenizer's chat template (Alpaca's prompt, if it has none), joined
    and cut into windows; the last, incomplete one is left out. An example may go on in the next window, and
    attends to those before it, as packing has it in most trainers. Of a conversation, every answer of the
    assistant is predicted.

    Args:
        source: a `.jsonl` file of conversations, "messages" with "role" and "content", or of instructions in
            Alpaca's format: "instruction", "output", and perhaps "input".
        length: tokens of a window.
        seed: of the shuffle.

    Returns: tokens and labels, int64 [N, length] each; labels are -100 in prompts.

    Raises:
        DataError: no such file, not of that form, refused by the chat template, or less than one window.
    """
    found = _examples(Path(source), tokenizer)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens: list[int] = []
    labels: list[int] = []
    for place in order:
        for part, kept in zip(_labelled(found[place], tokenizer), (tokens, labels), strict=True):
            kept += part
    count = len(tokens) // length
    if not count:
        raise DataError(
            f"expected {length} tokens or more in {source}, found {len(tokens)}: set a smaller length"
        )
    return tuple(torch.tensor(v[: count * length]).view(count, length) for v in (tokens, labels))  # type: ignore[return-value]


def _examples(path: Path, tokenizer: Any) -> list[Pieces]:
    if not path.is_file() or path.suffix != ".jsonl":
        raise DataError(f"expected instructions in a .jsonl file, found {path}")
    rows = read_lines(path.read_text("utf-8"), path)
    found = [pieces for n, row in rows for pieces in examples(row, tokenizer, f"line {n} of {path}")]
    if not found:
        raise DataError(f"expected instructions in {path}, found none")
    return found


def _labelled(pieces: Pieces, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of an example, made of it as one text, and their labels; without a template it gets its BOS."""
    text = "".join(piece for piece, _ in pieces)
    predicted = [p for piece, p in pieces for _ in piece]
    first = [] if tokenizer.chat_template else beginning(tokenizer)
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    tokens: list[int] = found["input_ids"]
    spans = found["offset_mapping"]
    labels = [
        token if begin < len(predicted) and predicted[begin] else IGNORED
        for token, (begin, _) in zip(tokens, spans, strict=True)
    ]
    return [*first, *tokens], [*[IGNORED] * len(first), *labels]
