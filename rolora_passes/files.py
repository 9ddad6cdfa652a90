"""Files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
