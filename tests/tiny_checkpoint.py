"""A tiny checkpoint with a tokenizer of one token a character, which spells any ASCII text."""

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
