"""`rolora run`: text from a compiled folder in its stock runtime."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rolora_passes.commands.options import at_least
from rolora_passes.errors import RunError


def add(commands: Any) -> None:
    parser = commands.add_parser("run", help="generate text from a compiled folder in its stock runtime")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=at_least(1, int), default=64)
    parser.add_argument("--temperature", type=at_least(0, float), default=0.0)
    parser.add_argument(
        "--raw", action="store_true", help="do not wrap the prompt in the model's chat template"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.export.runner import generate

    manifest = options.folder / "manifest.json"
    if not manifest.is_file():
        raise FileNotFoundError(
            f"expected a folder that `rolora compile` wrote, found no manifest.json in {options.folder}"
        )
    prompt = options.prompt if options.raw else _chat(options.folder, options.prompt)
    screen = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # the runner's own output is put aside
    try:
        generate(
            options.folder / "model.pte",
            options.folder / "tokenizer.json",
            prompt,
            options.max_new_tokens,
            options.temperature,
            on_text=lambda text: print(text, end="", flush=True, file=screen),
        )
    except RuntimeError as error:  # the runner's own
        program = options.folder / "model.pte"
        raise RunError(f"the runner failed on {program}: {error}; its log is above") from error
    print(file=screen, flush=True)


def _chat(folder: Path, prompt: str) -> str:
    """The prompt in the model's own chat template, where the tokenizer has one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
