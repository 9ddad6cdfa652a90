"""Instruction data: questions with answers become packed windows in which the answers alone are predicted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora_passes.data import read_lines
from rolora_passes.errors import DataError

IGNORED = -100  # what cross-entropy does not count

# Alpaca's own words (Taori et al., 2023), for a tokenizer without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_MORE = ", paired with an input that provides further context"


def instruction_windows(
    source: str | Path, tokenizer: Any, length: int = 1024, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Windows of instructions and answers, one after another without padding, and what is to be predicted.

    Examples are shuffled, written in the tokenizer's chat template (Alpaca's prompt, if it has none), joined
    and cut into windows; the last, incomplete one is left out. An example may go on in the next window, and
    attends to those before it, as packing has it in most trainers.

    Args:
        source: a `.jsonl` file in Alpaca's format: "instruction", "output", and perhaps "input".
        length: tokens of a window.
        seed: of the shuffle.

    Returns: tokens and labels, int64 [N, length] each; labels are -100 in prompts.

    Raises:
        DataError: no such file, not of that form, or less than one window.
    """
    pairs = _examples(Path(source))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens: list[int] = []
    labels: list[int] = []
    for place in order:
        for text, predicted in _written(pairs[place], tokenizer):
            found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens += found
            labels += found if predicted else [IGNORED] * len(found)
    count = len(tokens) // length
    if not count:
        raise DataError(
            f"expected {length} tokens or more in {source}, found {len(tokens)}: set a smaller length"
        )
    return tuple(torch.tensor(v[: count * length]).view(count, length) for v in (tokens, labels))  # type: ignore[return-value]


def _examples(path: Path) -> list[tuple[str, str, str]]:
    """(instruction, input, output) of every line."""
    if not path.is_file() or path.suffix != ".jsonl":
        raise DataError(f"expected instructions in a .jsonl file, found {path}")
    found = []
    for number, row in read_lines(path.read_text("utf-8"), path):
        values = [row.get(key, "") for key in ("instruction", "input", "output")]
        if not all(isinstance(v, str) for v in values) or not values[0] or not values[2]:
            raise DataError(
                f'expected "instruction" and "output" that hold strings in line {number} of {path}, found '
                f"the fields {', '.join(row) or '(none)'}"
            )
        found.append((values[0], values[1], values[2]))
    if not found:
        raise DataError(f"expected instructions in {path}, found none")
    return found


def _written(example: tuple[str, str, str], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The pieces of an example, and whether each is predicted."""
    instruction, context, answer = example
    if getattr(tokenizer, "chat_template", None) is None:
        given = f"### Input:\n{context}\n\n" if context else ""
        more = _MORE if context else ""
        yield _ALPACA.format(more=more, instruction=instruction, input=given), False
        yield answer + (tokenizer.eos_token or "\n\n"), True
        return
    question = f"{instruction}\n\n{context}" if context else instruction
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise DataError("expected a chat template that writes an answer after its prompt, found another")
    yield prompt, False
    yield whole.removeprefix(prompt), True
