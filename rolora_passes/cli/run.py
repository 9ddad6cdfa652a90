"""`rolora run`: generates text with a compiled folder in its stock runtime."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rolora_passes.cli.parser import at_least
from rolora_passes.errors import RunError, one_line

ORDER = 40
SUMMARY = "generate text with a compiled folder in its stock runtime"
EXAMPLES = (
    'rolora run COMPILED --prompt "What is the capital of France?"',
    'rolora run COMPILED --target onnx --raw --prompt "Once upon a time" --temperature 0.8',
)
_PROGRAMS = {"executorch": "model.pte", "onnx": "model.onnx"}


def add(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--target", choices=tuple(_PROGRAMS), help="which program (default: the first there is)"
    )


def run(options: argparse.Namespace) -> None:
    from rolora_passes.export.executorch import runner
    from rolora_passes.export.onnx import runner as onnx_runner

    folder = options.folder
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(
            f"expected a folder that `rolora compile` wrote, found no manifest.json in {folder}"
        )
    there = [target for target, file in _PROGRAMS.items() if (folder / file).is_file()]
    target = options.target or (there[0] if there else None)
    if target not in there:
        raise RunError(f"expected a program for {target or ' or '.join(_PROGRAMS)} in {folder}, found none")
    prompt, begin, count = _prompt(folder, options.prompt, options.raw)
    room = _held(folder) - count
    if room < 1:
        raise RunError(
            f"the prompt has {count} tokens, and the program holds {room + count} with the answer: "
            "give a shorter prompt, or compile with a larger --max-length"
        )
    descriptor = os.dup(sys.stdout.fileno())  # ExecuTorch prints too, and is sent elsewhere
    screen = os.fdopen(descriptor, "w", encoding=sys.stdout.encoding)

    def show(text: str) -> None:
        print(text, end="", flush=True, file=screen)

    given = (prompt, min(options.max_new_tokens, room), options.temperature, show, begin)
    try:
        if target == "onnx":
            onnx_runner.generate(folder, *given)
        else:
            runner.generate(folder / "model.pte", folder / "tokenizer.json", *given)
    except RuntimeError as error:  # the runner's own
        raise RunError(f"the runner failed on {folder / 'model.pte'}: {error}; its log is above") from error
    print(file=screen, flush=True)


def _held(folder: Path) -> int:
    """The number of tokens that a folder's programs hold."""
    try:
        return int(json.loads((folder / "manifest.json").read_text("utf-8"))["max_length"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"expected max_length in {folder / 'manifest.json'}, as `rolora compile` writes it, "
            f"found none: {one_line(error)}"
        ) from error


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
