"""The command line: `rolora COMMAND`, one of `COMMANDS`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rolora_passes.cli import (
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
from rolora_passes.cli.display import console
from rolora_passes.errors import QualityError, RoloraError, is_out_of_memory, one_line
from rolora_passes.log import logging_to

COMMANDS = (compile, learn, tune, run, eval, sensitivity, track, bisect, ablate, inspect, diff, passes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns: the exit status. 0: done; 1: the reader of a pipe has gone; 2: an error that the user can act on;
        3: the quantized graph is far from the model, and nothing was written; 130: interrupted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = _parser().parse_args(arguments)
    _hush()
    try:
        with _stopped_as_by_hand(), logging_to(options.log, sys.argv[1:] if arguments is None else arguments):
            options.run(options)
    except BrokenPipeError:  # the reader has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RoloraError, OSError) as error:
        _tell(f"{type(error).__name__}: {error}")
        return 3 if isinstance(error, QualityError) else 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _tell(f"not enough memory for this model ({one_line(error)})")
        return 2
    except KeyboardInterrupt:
        console.print(_interrupted(options), markup=False, soft_wrap=True)
        return 130
    return 0


def _tell(error: str) -> None:
    console.print("[bold red]error:[/] ", end="")
    console.print(error, markup=False, soft_wrap=True)


@contextmanager
def _stopped_as_by_hand() -> Iterator[None]:
    """SIGTERM (`kill`, a job's end) stops a command as Ctrl-C does, which removes what is half written."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(options: argparse.Namespace) -> str:
    """What is left of a run that was stopped: no results, which appear whole, but what is kept on the way."""
    kept = [(name, getattr(options, name, None)) for name in ("work", "log", "print_to")]
    places = [f"--{name.replace('_', '-')} {place}" for name, place in kept if place is not None]
    if not places:
        return "interrupted; nothing was written"
    return f"interrupted; no result was written, but what {' and '.join(places)} had by then is kept"


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
