"""The command line: `rolora COMMAND`, one of `COMMANDS`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from rolora_passes.commands import (
    ablate,
    bisect,
    compile,
    diff,
    eval,
    inspect,
    learn,
    passes,
    run,
    sensitivity,
    track,
    tune,
)
from rolora_passes.display import console
from rolora_passes.errors import RoloraError
from rolora_passes.log import logging_to

COMMANDS = (compile, learn, tune, run, eval, sensitivity, track, bisect, ablate, inspect, diff, passes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for an error the user can act on)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = _parser().parse_args(arguments)
    _hush()
    try:
        with logging_to(options.log, sys.argv[1:] if arguments is None else arguments):
            options.run(options)
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RoloraError, OSError) as error:
        console.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        console.print(str(error), markup=False, soft_wrap=True)
        return 2
    except MemoryError:
        console.print("[bold red]error:[/] not enough memory for this model")
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        return 130
    return 0


def _hush() -> None:
    """Leave what other libraries say about themselves out, unless Python is asked for warnings (`-W`)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        for name in ("torchao", "torch.utils._pytree", "lm_eval"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "rolora", description="Passes over graphs of language models, to the phone"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    for one in commands.choices.values():
        one.add_argument("--log", type=Path, metavar="FILE", help="write a log for a bug report")
    return parser


if __name__ == "__main__":
    sys.exit(main())
