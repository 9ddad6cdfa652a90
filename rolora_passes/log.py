"""A log of a run that a person can paste into a bug report."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rolora_passes.errors import RoloraError
from rolora_passes.memory import peak_mb
from rolora_passes.version import versions

_logger = logging.getLogger("rolora_passes")
_logger.addHandler(logging.NullHandler())  # without --log, what is logged goes nowhere


@contextmanager
def logging_to(path: Path | None, arguments: Sequence[str]) -> Iterator[None]:
    """Log what happens in the block: versions, the machine, the command, stages, passes, and an error.

    Lines are written as they come, so that the log of a run that was killed says how far it went.

    Args:
        path: a file, which is replaced; None logs nothing.
        arguments: of the command line.
    """
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, "w", "utf-8")
    handler.setFormatter(_Homeless("%(asctime)s %(message)s", "%H:%M:%S"))
    _logger.addHandler(handler)
    level = _logger.level
    _logger.setLevel(logging.INFO)
    start = time.perf_counter()
    try:
        _logger.info("rolora %s", shlex.join(arguments))
        for line in environment():
            _logger.info(line)
        yield
        _logger.info("done")
    except BaseException as error:
        ours = "failed" if isinstance(error, RoloraError) else "failed unexpectedly"
        _logger.info(ours, exc_info=True)
        raise
    finally:
        _logger.info("%.1f s, peak %.0f MB", time.perf_counter() - start, peak_mb())
        _logger.setLevel(level)
        _logger.removeHandler(handler)
        handler.close()


def environment() -> list[str]:
    """The date, the machine and the versions, in lines."""
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return [
        time.strftime("%Y-%m-%d %H:%M:%S %z"),
        f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs, "
        f"OMP_NUM_THREADS {threads}",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]


def without_home(text: str) -> str:
    """Text in which the home folder, and with it the user's name, is `~`."""
    home = str(Path.home())
    return text if home == os.sep else text.replace(home, "~")


class _Homeless(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_home(super().format(record))
