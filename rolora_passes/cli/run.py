"""`rolora run`: generates text with a compiled folder in its stock runtime."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rolora_passes.cli.parser import at_least
from rolora_passes.errors import RunError

ORDER = 40
SUMMARY = "generate text with a compiled folder in its stock runtime"
EXAMPLES = (
    'rolora run COMPILED --prompt "What is the capital of France?"',
    'rolora run COMPILED --target onnx --raw --prompt "Once upon a time" --temperature 0.8',
)


def add(parser: argparse.ArgumentParser) -> None:
    from rolora_passes.export.target import TARGETS

    parser.add_argument("folder", type=Path, help="a folder that `rolora compile` wrote")
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what to answer; with --raw, what to continue"
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least(1, int), default=64, metavar="TOKENS", help="stop after this many"
    )
    parser.add_argument(
        "--temperature", type=at_least(0, float), default=0.0, metavar="T",
        help="divides the logits before sampling; 0 takes the likeliest token every time",
    )  # fmt: skip
    parser.add_argument(
        "--raw", action="store_true", help="do not wrap the prompt in the model's chat template"
    )
    parser.add_argument("--target", choices=list(TARGETS), help="which program (default: the first there is)")


def run(options: argparse.Namespace) -> None:
    from rolora_passes.export.folder import MANIFEST, find_target, read_manifest

    folder = options.folder
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"expected a folder that `rolora compile` wrote, found no {MANIFEST} in {folder}"
        )
    target = find_target(folder, options.target)
    prompt, begin, count = _prompt(folder, options.prompt, options.raw)
    room = read_manifest(folder)["max_length"] - count
    if room < 1:
        raise RunError(
            f"the prompt has {count} tokens, and the program holds {room + count} with the answer: "
            "give a shorter prompt, or compile with a larger --max-length"
        )
    descriptor = os.dup(sys.stdout.fileno())  # a runner may print too, and is sent elsewhere
    screen = os.fdopen(descriptor, "w", encoding=sys.stdout.encoding)

    def show(text: str) -> None:
        print(text, end="", flush=True, file=screen)

    target.run(folder, prompt, min(options.max_new_tokens, room), options.temperature, show, begin)
    print(file=screen, flush=True)


def _prompt(folder: Path, prompt: str, raw: bool) -> tuple[str, int, int]:
    """(the prompt as the program reads it, special tokens that the tokenizer adds before it, all its tokens).

    The prompt is wrapped in the model's chat template, which has its own special tokens, or left as it is.
    """
    from rolora_passes.loading.tokens import beginning, in_template
    from rolora_passes.recipes.opening import load_tokenizer

    tokenizer = load_tokenizer(folder)
    begin = 0
    if raw or not tokenizer.chat_template:
        begin = len(beginning(tokenizer))
    else:
        turns = [{"role": "user", "content": prompt}]
        prompt = in_template(tokenizer, turns, add_generation_prompt=True)
    tokens = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return prompt, begin, begin + len(tokens)
