"""The tokenizer that a GGUF file describes, where transformers leaves out what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rolora_passes.errors import CaptureError
from rolora_passes.loading.checkpoint import some
from rolora_passes.loading.gguf_reading import read_once

_READ = (
    *("model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token"),
    *("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "eot_token_id", "eom_token_id"),
    *("add_space_prefix", "precompiled_charsmap"),
)
_NO_EFFECT = (  # on the tokens of a text
    *("seperator_token_id", "separator_token_id", "cls_token_id", "mask_token_id", "token_type_count"),
    *("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id", "fim_rep_token_id"),
    *(
        "fim_sep_token_id",
        "prefix_token_id",
        "suffix_token_id",
        "middle_token_id",
        "remove_extra_whitespaces",
    ),
)
# How llama.cpp cuts a text into words, by a name: digits one by one and the rest as GPT-2, or all as GPT-2.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_PLAIN = (
    "gpt-2",
    "default",
    "phi-2",
    "jina-es",
    "jina-de",
    "gigachat",
    "jina-v2-es",
    "jina-v2-de",
    "olmo",
    "mpt",
)
# Those that begin a text with BOS, and take a word whole that is a token, where a file does not say so.
_BEGIN = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def require_tokens_known(entries: dict[str, Any], path: Path) -> None:
    """Refuse a file whose tokenizer has an entry that nobody reads, or cuts words as nobody knows.

    Raises:
        CaptureError: names the entry.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    own = _own(entries)
    strange = [
        f"tokenizer.ggml.{name}"
        for name, value in own.items()
        if name not in (*_READ, *_NO_EFFECT) and not (name == "add_sep_token" and value is False)
    ]
    others = ("tokenizer.ggml.", "tokenizer.chat_template", "tokenizer.huggingface.json")
    strange += [name for name in entries if name.startswith("tokenizer.") and not name.startswith(others)]
    if strange:
        raise CaptureError(f"nothing reads the entry {some(strange)} of {path}: its tokenizer would differ")
    pre = own.get("pre", "default")
    if own.get("model") == "gpt2" and pre not in (*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS, *_PLAIN):
        raise CaptureError(
            f"tokenizer.ggml.pre of {path} is {pre!r}, and how that cuts a text into words is not "
            "known here: give the "
            "checkpoint that the file was made of"
        )


def load_tokenizer(path: Path, entries: dict[str, Any]) -> Any:
    """The tokenizer of a file.

    Raises:
        CaptureError: it begins words as the file says it does not.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    own = _own(entries)
    with read_once():
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if own.get("model") != "gpt2":
        _require_prefix(tokenizer, own, path)
        return tokenizer
    begins = own.get("add_bos_token", own.get("pre") in _BEGIN and "bos_token_id" in own)
    if own.get("pre") in _DIGITS:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), words]
        )
    if own.get("pre") in _BEGIN:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    _begin(tokenizer, bool(begins), bool(own.get("add_eos_token", False)))
    _require_prefix(tokenizer, own, path)
    return tokenizer


def end_tokens(entries: dict[str, Any]) -> list[int]:
    """Tokens at which a text or a turn ends, as the file says."""
    own = _own(entries)
    return list(dict.fromkeys(int(own[name]) for name in ENDS if name in own))


def _begin(tokenizer: Any, first: bool, last: bool) -> None:
    """Have a tokenizer write BOS before a text, and EOS after it, or neither."""
    from tokenizers import processors

    parts, known = ["$A"], []
    for use, token, place in ((first, tokenizer.bos_token, 0), (last, tokenizer.eos_token, len(parts) + 1)):
        if use:
            parts.insert(place, token)
            known.append((token, tokenizer.convert_tokens_to_ids(token)))
    template = processors.TemplateProcessing(single=" ".join(parts), special_tokens=known)
    tokenizer.backend_tokenizer.post_processor = template


def _require_prefix(tokenizer: Any, own: dict[str, Any], path: Path) -> None:
    expected = own.get("add_space_prefix", own.get("model") == "llama" and "add_space_prefix" not in own)
    found = (tokenizer.tokenize("a") or [""])[0][:1] in ("▁", "Ġ")
    if "add_space_prefix" in own and bool(expected) != found:
        raise CaptureError(
            f"tokenizer.ggml.add_space_prefix of {path} is {expected}, and transformers' tokenizer "
            "of this kind "
            f"writes {'a' if found else 'no'} space before a text: give the checkpoint that the "
            "file was made of"
        )


def _own(entries: dict[str, Any]) -> dict[str, Any]:
    prefix = "tokenizer.ggml."
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
