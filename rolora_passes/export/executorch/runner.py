"""Running a `.pte` with ExecuTorch's own runtime: text through the stock runner, logits directly."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora_passes.errors import LoweringError, RunError, one_line
from rolora_passes.export.target import Encode
from rolora_passes.extras import require

Forward = Callable[[Tensor, Tensor], Tensor]
"""tokens int64 [1, S], input_pos int64 [1] -> logits [1, S or 1, V]; the caches keep state between calls."""


def generate(
    pte: str | os.PathLike[str],
    tokenizer_json: str | os.PathLike[str],
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
    begin: int = 0,
) -> str:
    """Continue a prompt with ExecuTorch's `TextLLMRunner`; returns the new text.

    The runner gives the text of each token by itself, and a token may be half a character, which is no text:
    here it gives the tokens as the vocabulary writes them, and they are decoded together.

    Args:
        begin: how many tokens that begin a text (BOS) the runner is to write before the prompt. Nothing in a
            program tells it: an app says so in its generation configuration.
        on_text: called with each piece of text as it is generated, in whole characters.

    Raises:
        RuntimeError: the runner's own.
        RunError: it gives a token that is not in the vocabulary.
        MissingExtraError: ExecuTorch is not installed.
    """
    _load_kernels()
    llm = require("executorch.extension.llm.runner", "executorch")
    text = _Text(Path(tokenizer_json), prompt, on_text or (lambda piece: None))
    config = llm.GenerationConfig(
        echo=False, max_new_tokens=max_new_tokens, temperature=temperature, num_bos=begin
    )
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokenizer.json"
        known = json.loads(Path(tokenizer_json).read_text("utf-8"))
        tokens.write_text(json.dumps(known | {"decoder": None}), "utf-8")
        with _put_aside_output():
            llm.TextLLMRunner(os.fspath(pte), str(tokens)).generate(prompt, config, text.add)
    return text.end()


class _Text:
    """The text of tokens that follow a prompt, told in whole characters as the tokens come."""

    def __init__(self, tokenizer_json: Path, prompt: str, tell: Callable[[str], None]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer, self._tell = Tokenizer.from_file(str(tokenizer_json)), tell
        self._ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        self._start = self._told = len(self._decoded())

    def add(self, token: str) -> None:
        """Take one more token, as the vocabulary writes it."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise RunError(f"the runner gives the token {token!r}, which tokenizer.json does not have")
        self._ids.append(number)
        self._say(self._decoded().rstrip("\ufffd"))  # which may become a character with the next token

    def end(self) -> str:
        """All of the text; what is not whole is told as it is."""
        self._say(text := self._decoded())
        return text[self._start :]

    def _say(self, text: str) -> None:
        if piece := text[self._told :]:
            self._told = len(text)
            self._tell(piece)

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=False))


@contextmanager
def _put_aside_output() -> Iterator[None]:
    """Send what native code writes to the process's output elsewhere: the runner prints text and logs itself.

    If the runner fails, what it said is written to standard error.
    """
    with tempfile.TemporaryFile() as file:
        kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        try:
            for descriptor in kept:
                os.dup2(file.fileno(), descriptor)
            yield
        except BaseException:
            file.seek(0)
            os.write(kept[2], file.read())
            raise
        finally:
            for descriptor, original in kept.items():
                os.dup2(original, descriptor)
                os.close(original)


def load_pte(pte: str | os.PathLike[str], method: str = "forward") -> Forward:
    """The program's `forward(tokens, input_pos) -> logits`, or another method, with its own caches.

    Tokens beyond what the program takes in a call (`get_max_seq_len`) are given in pieces, as the stock
    runner does.
    """
    module = _load_kernels()._load_for_executorch(os.fspath(pte))
    longest = int(module.run_method("get_max_seq_len", ())[0])

    def forward(tokens: Tensor, input_pos: Tensor) -> Tensor:
        found, place = [], input_pos
        for piece in tokens.split(longest, 1):
            logits: Tensor = module.run_method(method, (piece.contiguous(), place))[0]
            found.append(logits.clone())  # the runtime reuses the memory
            place = place + piece.shape[1]
        return torch.cat(found, 1) if found[0].shape[1] > 1 else found[-1]

    return forward


def encoder(folder: Path) -> Encode:
    """The runner's tokenizer, with the `tokenizer.json` of a folder.

    Raises:
        LoweringError: it cannot load that.
        MissingExtraError: ExecuTorch is not installed.
    """
    runtime = require("pytorch_tokenizers", "executorch").CppHFTokenizer()
    try:
        runtime.load(str(folder / "tokenizer.json"))
    except Exception as error:  # as many as there are ways to fail
        raise LoweringError(
            f"ExecuTorch's tokenizer cannot load the model's tokenizer.json: {one_line(error)}; "
            "another target's may"
        ) from error
    return lambda text: runtime.encode(text, 0, 0)


def _load_kernels() -> Any:
    """Register the kernels our programs call; without them loading fails with "Missing operator"."""
    bindings = require("executorch.extension.pybindings.portable_lib", "executorch")
    require("executorch.extension.llm.custom_ops.custom_ops", "executorch")
    require("executorch.kernels.quantized", "executorch")
    return bindings
