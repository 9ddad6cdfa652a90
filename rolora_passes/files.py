"""Files appear whole or not at all, and a folder is one process's at a time."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rolora_passes.errors import WorkError


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; moved over it on success, removed on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with _named(path, temporary):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`; takes its place on success, removed on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        with _named(path, temporary):
            yield temporary
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def holding(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made: they are refused here.

    The system drops the lock when its process ends, however it does: none is ever stale.

    Raises:
        WorkError: another process holds the folder, or it cannot be written to.
    """
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise WorkError(
            f"cannot work in {folder}: {error.strerror or error}; give a folder that can be written to "
            "(--work)"
        ) from error
    with file:
        if not _locked(file.fileno(), path):
            file.seek(0)
            raise WorkError(
                f"another process ({file.read().strip() or 'unknown'}) works in {folder}: wait until it "
                "ends, or give another folder (--work)"
            )
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                path.unlink()


def _locked(file: int, path: Path) -> bool:
    """Lock an open file for this process; False if another has it, or has removed it meanwhile."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        system: Any = msvcrt
        os.lseek(file, 1 << 20, os.SEEK_SET)  # beyond what others are to read
        try:
            system.locking(file, system.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(file, 0, os.SEEK_SET)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file))


@contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """A failed write (a full disk) says neither what nor where, or a hidden name; say what was asked for."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    except OSError as error:
        error.filename = str(error.filename or path).replace(str(temporary), str(path))
        raise


def _beside(path: Path) -> Path:
    """A hidden name in the same folder; what is made there has the permissions anything else would have."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
