"""What a tokenizer adds to a text, and the tokens at which generation ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rolora_passes.errors import DataError, one_line

_WORD = "answer"


def beginning(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer writes before every text: BOS, for most models, or none."""
    plain = list(tokenizer(_WORD, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(_WORD)["input_ids"])
    for count in range(len(whole) - len(plain) + 1):
        if whole[count : count + len(plain)] == plain:
            return whole[:count]
    return []


def end_tokens(model: Any, tokenizer: Any, more: Iterable[int] = ()) -> list[int]:
    """Every token that ends a text or a turn: what each of the model's files says, joined.

    These are the end tokens of the configuration, of the generation configuration and of the tokenizer, and
    the special token that follows an assistant's words in the chat template.

    Args:
        more: what else is known to end a text.
    """
    generation = getattr(model, "generation_config", None)
    text = model.config.get_text_config()
    said = [
        getattr(generation, "eos_token_id", None),
        getattr(text, "eos_token_id", None),
        tokenizer.eos_token_id,
    ]
    found = [i for value in said for i in (value if isinstance(value, (list, tuple)) else [value])]
    found += [*more, turn_end(tokenizer)]
    return list(dict.fromkeys(int(i) for i in found if i is not None))


def turn_end(tokenizer: Any) -> int | None:
    """The special token that a chat template writes after an assistant's words; None if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _WORD}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template may refuse these turns, in any way
        return None
    after = tokenizer(text.rpartition(_WORD)[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return int(after[0]) if after and after[0] in special else None


def in_template(
    tokenizer: Any, turns: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """Turns of a chat as the model's template writes them.

    Raises:
        DataError: the template refuses them; says its words.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except Exception as error:  # whatever a template's code raises
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        raise DataError(f"the model's chat template refuses turns of {roles}: {one_line(error)}") from error
