"""Running a `.pte` with ExecuTorch's own runtime: text through the stock runner, logits directly."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rolora_passes.export.extras import require

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

    Args:
        begin: how many tokens that begin a text (BOS) the runner is to write before the prompt. Nothing in a
            program tells it: an app says so in its generation configuration.
        on_text: called with each piece of text as it is generated.
    """
    _load_kernels()
    llm = require("executorch.extension.llm.runner", "executorch")
    pieces: list[str] = []

    def collect(text: str) -> None:
        pieces.append(text)
        if on_text is not None:
            on_text(text)

    config = llm.GenerationConfig(
        echo=False, max_new_tokens=max_new_tokens, temperature=temperature, num_bos=begin
    )
    with _put_aside_output():
        llm.TextLLMRunner(os.fspath(pte), os.fspath(tokenizer_json)).generate(prompt, config, collect)
    return "".join(pieces)


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


def _load_kernels() -> Any:
    """Register the kernels our programs call; without them loading fails with "Missing operator"."""
    bindings = require("executorch.extension.pybindings.portable_lib", "executorch")
    require("executorch.extension.llm.custom_ops.custom_ops", "executorch")
    require("executorch.kernels.quantized", "executorch")
    return bindings
