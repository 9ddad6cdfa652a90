"""Tiny checkpoints: with a token for every ASCII character, or with one for every byte."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHARACTERS = "?\n" + "".join(chr(code) for code in range(32, 127) if chr(code) != "?")
TEXT = "The quick brown fox jumps over the lazy dog; and then, of course, it sleeps.\n" * 4


def character_tokenizer() -> t.PreTrainedTokenizerFast:
    """Ids below 97: 0 is `?` and whatever is unknown, the others are characters."""
    spelled = CHARACTERS.replace("\n", "Ċ").replace(" ", "Ġ")  # a form that every runtime reads
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(spelled)}, [], unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="~", bos_token=None, clean_up_tokenization_spaces=False
    )


def save_checkpoint(folder: Path, length: int = 256) -> Path:
    """A random llama of 97 tokens and `length` positions as transformers writes it, with that tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = t.LlamaConfig(
        vocab_size=97, max_position_embeddings=length, tie_word_embeddings=False, **sizes, **heads
    )
    model = t.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def save_byte_checkpoint(folder: Path, layers: int = 2) -> Path:
    """A random llama of 128 positions with a tokenizer of bytes, which both runtimes' own tokenizers read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<end>"])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    t.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    model = t.LlamaForCausalLM(
        t.LlamaConfig(vocab_size=257, max_position_embeddings=128, **sizes, **heads, **ends)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
        strange = [i for i, c in enumerate([*alphabet, ""]) if not (c.isascii() and c.isprintable())]
        model.lm_head.weight[strange] = 0  # text of other bytes is no text
    model.save_pretrained(folder)
    return folder
