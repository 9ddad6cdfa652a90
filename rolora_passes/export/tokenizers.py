"""The model's own tokenizer in a compiled folder, compared with what the runtime's tokenizer makes of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rolora_passes.errors import LoweringError
from rolora_passes.export.target import Encode, Target, make_target
from rolora_passes.loading.models import load_tokenizer, tokenizer_files

# What people write every day, on which ids must agree; and what a runtime's tokenizer may not know.
_COMMON = (
    "The quick brown fox jumps over the lazy dog.",
    "What is 12 + 7? Answer in one word, please!",
    "It's John's: he said \"yes\" (and we'll see).",
    "First line\nsecond line",
)
_RARE = (
    " two  spaces  and   three ",
    "a\n\n\nb\n",
    "\tdef f(x):\n\t\treturn x",
    "café naïve Straße",
    "你好，世界 こんにちは",
    "Привет мир",
    "🙂 emoji 👩‍👩‍👧",
    "1234567890 3.14159",
    "https://example.com/a_b?c=d#e",
)


def require_tokenizer(source: str, targets: Sequence[Target | str], tokenizer: Any = None) -> list[str]:
    """Refuse a model whose tokenizer a runtime cannot load, or with which it gives other tokens.

    It takes no weights: this can be said before they are loaded. Returns what users should know, such as
    texts on which a runtime differs.

    Args:
        tokenizer: the model's, if it is loaded already.

    Raises:
        CaptureError: the model has no tokenizer that transformers loads.
        LoweringError: names the runtime, and a text on which it differs.
    """
    tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(source, tokenizer, Path(folder))
        return require_same_tokens(Path(folder), tokenizer, targets)


def save_tokenizer(source: str, tokenizer: Any, folder: Path) -> None:
    """Put a model's tokenizer into a folder: its own files as they are, or what transformers made of a GGUF.

    Where a model has no tokenizer.json, which the runtimes read, transformers writes all files.
    """
    own = tokenizer_files(source)
    if not any(path.name == "tokenizer.json" for path in own):
        tokenizer.save_pretrained(folder)
        return
    for path in own:
        shutil.copyfile(path, folder / path.name)


def require_same_tokens(folder: Path, tokenizer: Any, targets: Sequence[Target | str]) -> list[str]:
    """Compare the tokenizer in a folder, as each target's runtime loads it, with the model's own.

    Everyday texts must have the same tokens, and special tokens must be found in a text. What else differs is
    returned, a line for each target.

    Raises:
        LoweringError: the runtime cannot load it, or differs.
    """
    notes = []
    for target in map(make_target, targets):
        encoder = target.encode(folder)
        if encoder is None:
            continue
        encode = partial(_tokens, encoder)
        for text in _COMMON:
            if (found := encode(text)) != (expected := _own(tokenizer, text)):
                raise LoweringError(
                    f"expected the tokens of the model's own tokenizer from that of {target.name}'s "
                    "runtime, found "
                    f"{found[:12]} for {text!r}, not {expected[:12]}: the program would read other words"
                )
        for token, number in _special(tokenizer).items():
            if number not in encode(f"a{token}"):
                raise LoweringError(
                    f"expected the tokenizer of {target.name}'s runtime to know the special token "
                    f"{token} ({number}), found "
                    f"{encode(token)[:12]}: is it missing from tokenizer.json's added_tokens?"
                )
        rare = [*_RARE, *(f"{token}words" for token in _special(tokenizer)), *_chat(tokenizer)]
        if wrong := [text for text in rare if encode(text) != _own(tokenizer, text)]:
            notes.append(
                f"the tokenizer of {target.name}'s runtime gives other tokens than transformers' on "
                f"{len(wrong)} of "
                f"{len(rare)} rarer texts, such as {wrong[0]!r:.80}"
            )
    return notes


def _special(tokenizer: Any) -> dict[str, int]:
    """Special tokens that a chat or a text has, by what they are written as."""
    pairs = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return dict(list(pairs)[:32])


def _chat(tokenizer: Any) -> list[str]:
    """A question in the model's chat template; nothing, if there is none or it takes no single question."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": _COMMON[0]}]
    try:
        return [str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))]
    except Exception:  # a template may refuse these turns, in any way
        return []


def _own(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _tokens(encode: Encode, text: str) -> list[int]:
    try:
        return [int(token) for token in encode(text)]
    except RuntimeError:  # a text with something that is not in the vocabulary, for some
        return []
