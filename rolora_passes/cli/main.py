"""`rolora COMMAND`: finds the commands, runs one, and turns errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

from rolora_passes.cli.display import console
from rolora_passes.cli.options import spilling_to
from rolora_passes.cli.parser import add_command
from rolora_passes.errors import QualityError, RoloraError, is_out_of_memory, one_line
from rolora_passes.log import logging_to

RENAMED = {
    "track": ("diagnose", "errors"),
    "bisect": ("diagnose", "bisect"),
    "ablate": ("diagnose", "ablate"),
    "sensitivity": ("diagnose", "sensitivity"),
}
"""Commands by the names they had until 0.2, which work until 0.3."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns: the exit status. 0: done; 1: the reader of a pipe has gone; 2: an error that the user can act on;
        3: the quantized graph is far from the model, and nothing was written; 130: interrupted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = argparse.Namespace()
    try:
        words = _renamed(given)
        options = parser(words[0] if words else None).parse_args(words)
        _hush()
        with (
            _stopped_as_by_hand(),
            logging_to(options.log, given),
            spilling_to(options),
            _computing(options),
        ):
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


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        only: declare the options of this command alone; `compile` has those of targets, which import torch.
    """
    whole = argparse.ArgumentParser(
        "rolora", description="Passes over graphs of language models, to the phone"
    )
    choices = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, module in commands().items():
        one = add_command(choices, name, module.SUMMARY, module.EXAMPLES)
        one.set_defaults(run=module.run)
        if only is None or name == only:
            module.add(one)
    return whole


def commands() -> dict[str, ModuleType]:
    """The modules of the commands by name, in the order of the list."""
    package = __package__ or "rolora_passes.cli"
    path = import_module(package).__path__
    found = {m.name: import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(path)}
    known = [(name, module) for name, module in found.items() if hasattr(module, "ORDER")]
    return dict(sorted(known, key=lambda entry: entry[1].ORDER))


def _renamed(arguments: list[str]) -> list[str]:
    """Arguments with today's name of the command, and a note if they have an older one."""
    if not arguments or arguments[0] not in RENAMED:
        return arguments
    old, *rest = arguments
    new = RENAMED[old]
    console.print(f"rolora {old} is `rolora {' '.join(new)}` now; the old name goes in 0.3", soft_wrap=True)
    return [*new, *rest]


def _tell(error: str) -> None:
    console.print("[bold red]error:[/] ", end="")
    console.print(error, markup=False, soft_wrap=True)


def _computing(options: argparse.Namespace) -> AbstractContextManager[None]:
    """On the device that a command was given; commands that compute nothing have no such option."""
    if getattr(options, "device", "cpu") == "cpu":
        return nullcontext()  # torch need not be imported for that
    from rolora_passes.graphs.devices import computing_on

    return computing_on(options.device)


@contextmanager
def _stopped_as_by_hand() -> Iterator[None]:
    """SIGTERM (`kill`, a job's end) stops a command as Ctrl-C does, which removes what is half written."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(options: argparse.Namespace) -> str:
    """What an interrupted run leaves behind: no results, which are written whole or not at all, but its logs
    and finished parts."""
    kept = [(name, getattr(options, name, None)) for name in ("work", "log", "print_to")]
    places = [f"--{name.replace('_', '-')} {place}" for name, place in kept if place is not None]
    if not places:
        return "interrupted; nothing was written"
    return f"interrupted; no result was written, but what {' and '.join(places)} had by then is kept"


def _hush() -> None:
    """Silence the warnings of other libraries, unless Python was asked for warnings (`-W`)."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", r".*(goes in 0\.3|name of rolora-passes)", Warning)
        for name in ("torchao", "torch.utils._pytree", "lm_eval"):
            logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
