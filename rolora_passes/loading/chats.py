"""Conversations of data files, Alpaca's and `messages`, as text in a model's chat template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rolora_passes.errors import DataError
from rolora_passes.loading.tokens import in_template

Turns = list[dict[str, Any]]
"""{"role": "user", "content": "..."} and so on, as chat templates take them."""
Pieces = list[tuple[str, bool]]
"""The text of an example, and which parts of it are an assistant's own words, to be predicted."""

# Alpaca's own words (Taori et al., 2023), for a tokenizer without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_MORE = ", paired with an input that provides further context"
_SENTINEL = "\ue000answer\ue001"  # no text begins or ends so: private use characters


def turns_of(row: dict[str, Any], where: str) -> Turns:
    """The turns of a line of data: "messages", or Alpaca's "instruction", "input" and "output".

    Raises:
        DataError: neither, or without an answer.
    """
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
            raise DataError(f'expected "messages" that are objects with "role" and "content" in {where}')
        if not any(turn["role"] == "assistant" for turn in turns):
            raise DataError(f'expected "messages" with an assistant\'s answer in {where}, found none')
        return turns
    values = [row.get(key, "") for key in ("instruction", "input", "output")]
    if not all(isinstance(v, str) for v in values) or not values[0] or not values[2]:
        raise DataError(
            f'expected "messages", or "instruction" and "output" that hold strings in {where}, '
            "found the fields "
            f"{', '.join(row) or '(none)'}"
        )
    question = f"{values[0]}\n\n{values[1]}" if values[1] else values[0]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": values[2]}]


def examples(row: dict[str, Any], tokenizer: Any, where: str) -> Iterator[Pieces]:
    """A line of data as one text, or several where the template rewrites an answer once others follow it.

    Templates of reasoning models leave the thoughts of finished turns out, or end a prompt in an opened
    thought that a finished turn lacks. Every answer is then learned behind the text that comes before it.

    Raises:
        DataError: not of a known form, or refused by the template.
    """
    turns = turns_of(row, where)
    if not getattr(tokenizer, "chat_template", None):
        yield _without_template(row, tokenizer, where)
        return
    written = ""
    pieces: Pieces = []
    try:
        for place, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            whole, start = _answer(turns[: place + 1], tokenizer)
            if written and not (whole.startswith(written) and start >= len(written)):
                yield pieces
                written, pieces = "", []
            pieces = [*pieces, (whole[len(written) : start], False), (whole[start:], True)]
            written = whole
    except DataError as error:
        raise DataError(f"{error}, in {where}") from error
    yield pieces


def _answer(turns: Turns, tokenizer: Any) -> tuple[str, int]:
    """The text of turns that end in an answer, and where in it the answer begins.

    That is behind the prompt, as a model is given it. Where the prompt is no beginning of the text, it is
    where the texts of two different answers part.
    """
    prompt = in_template(tokenizer, turns[:-1], add_generation_prompt=True)
    whole = in_template(tokenizer, turns)
    if whole.startswith(prompt):
        return whole, len(prompt)
    other = in_template(tokenizer, [*turns[:-1], {"role": "assistant", "content": _SENTINEL}])
    pairs = zip(whole, other, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if start is None or _SENTINEL not in other:
        raise DataError("expected a chat template that writes what an assistant says, found another")
    return whole, start


def _without_template(row: dict[str, Any], tokenizer: Any, where: str) -> Pieces:
    if "messages" in row:
        raise DataError(
            f'expected a tokenizer with a chat template for the "messages" in {where}, found none: add one '
            "(chat_template.jinja), or give instructions in Alpaca's format"
        )
    given = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
    more = _MORE if given else ""
    prompt = _ALPACA.format(more=more, instruction=row["instruction"], input=given)
    return [(prompt, False), (row["output"] + (tokenizer.eos_token or "\n\n"), True)]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
