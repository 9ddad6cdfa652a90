"""What begins and ends a text is what all of a model's files say, joined."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as t
from tiny_checkpoint import character_tokenizer
from tokenizers import processors

from rolora_passes.errors import DataError
from rolora_passes.loading.tokens import beginning, end_tokens, in_template, turn_end

CHATML = "{% for m in messages %}{{ m.role }}:{{ m.content }}|\n{% endfor %}"


class Model:
    """What `end_tokens` looks at."""

    def __init__(self, configured: Any, generating: Any) -> None:
        self.config = t.LlamaConfig(eos_token_id=configured)
        self.generation_config = t.GenerationConfig(eos_token_id=generating)


def with_turns(template: str | None, special: bool = True) -> Any:
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["|"], special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def test_the_beginning_is_what_the_tokenizer_adds() -> None:
    tokenizer = character_tokenizer()
    assert beginning(tokenizer) == []
    template = processors.TemplateProcessing("~ $A ~", special_tokens=[("~", tokenizer.eos_token_id)])
    tokenizer._tokenizer.post_processor = template
    assert beginning(tokenizer) == [tokenizer.eos_token_id]


def test_ends_are_joined() -> None:
    tokenizer = with_turns(CHATML)
    bar, end = tokenizer.convert_tokens_to_ids("|"), tokenizer.eos_token_id
    assert end_tokens(Model(5, [6, 7]), tokenizer, [8]) == [6, 7, 5, end, 8, bar]
    assert end_tokens(Model(None, None), tokenizer) == [end, bar]
    assert end_tokens(Model(end, end), with_turns(None)) == [end]


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('no') }}", "{{ messages[-1].content }}", "{{ 1 }}"]
)
def test_no_end_of_a_turn_is_made_up(template: str | None) -> None:
    assert turn_end(with_turns(template)) is None
    assert turn_end(with_turns(CHATML, special=False)) is None


def test_a_template_that_raises_says_its_words() -> None:
    with pytest.raises(DataError, match=r"refuses turns of user: .*a system message must come first"):
        in_template(
            with_turns("{{ raise_exception('a system message must come first') }}"), [{"role": "user"}]
        )
