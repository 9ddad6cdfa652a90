"""Tensors whose values lie in files, mapped into memory: read when they are needed, and let go of again.

They are ordinary tensors, and nobody may write into them: `rest` drops their pages, and the next read brings
the file's values back.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from rolora_passes.errors import SourceError, SpillError
from rolora_passes.memory import release, resident

_DONT_NEED = 4  # MADV_DONTNEED
_SMALLEST = 1 << 20  # bytes; smaller tensors stay in memory


def on_disk(tensor: Tensor, file: Path | None = None) -> Tensor:
    """The same tensor, marked as mapped from a file.

    Args:
        file: one that others may change; None: nobody else knows it.
    """
    tensor._on_disk = True  # type: ignore[attr-defined]
    if file is not None:
        tensor._file = file, _state(file)  # type: ignore[attr-defined]
    return tensor


def require_whole(tensor: Tensor) -> None:
    """Refuse a tensor whose file was cut or written to since it was mapped.

    To read beyond the end of a file ends the process. One that was removed is there for who has it open.

    Raises:
        SourceError: so it was.
    """
    if not hasattr(tensor, "_file"):
        return
    file, known = tensor._file
    with suppress(FileNotFoundError):
        if (found := _state(file)) != known:
            raise SourceError(
                f"expected {file} as it was when it was opened, {known[0]} bytes, found it written to since, "
                f"{found[0]} bytes: fetch it again, and run again when nothing writes to it"
            )


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def is_on_disk(tensor: Tensor) -> bool:
    """Whether a tensor is mapped from a file, as far as `on_disk` was told."""
    return getattr(tensor, "_on_disk", False)


def rest(tensor: Tensor, part: Tensor | None = None) -> None:
    """Give back the memory that a mapped tensor's pages take (on Linux; other systems do it when they must).

    Args:
        tensor: nothing is done to one that does not lie on disk.
        part: a view of it, of which alone the pages go.
    """
    advise = _advise()
    if advise is None or not is_on_disk(tensor):
        return
    view = tensor if part is None else part
    if view.numel() and view.is_contiguous():
        start = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, view.data_ptr() + view.nbytes - start, _DONT_NEED)


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None, use_errno=True).madvise
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found


class Spill:
    """A folder for tensors that passes make, so that they need not fit into memory.

    A file has no name once it is mapped (on Windows: until the process ends), so nothing is left behind,
    however the process ends.

    Args:
        folder: on a disk, not in memory (as /tmp may be).
        limit: bytes that may lie there at once; None for what the disk holds.
        memory: bytes that the process may take; None for what the machine has. It bounds what is kept in
            memory by choice, such as values between the stages of a calibration: `memory_left`.
    """

    def __init__(self, folder: Path, limit: int | None = None, memory: int | None = None) -> None:
        self.folder, self.limit, self.memory, self.used = folder, limit, memory, 0

    def hold(self, nbytes: int) -> None:
        """Count bytes that are about to be written.

        Raises:
            SpillError: there are more than the limit.
        """
        total = self.used + nbytes
        if self.limit is not None and total > self.limit:
            raise SpillError(
                f"expected at most {self.limit / 1e9:.3g} GB of weights in {self.folder} (--spill-limit), "
                f"found {total / 1e9:.3g} GB: raise the limit"
            )
        self.used = total

    def free(self, nbytes: int) -> None:
        """Count bytes that are gone: nothing reads them any more."""
        self.used -= nbytes


_spill: ContextVar[Spill | None] = ContextVar("spill", default=None)


@contextmanager
def spilling(folder: str | Path, limit: int | None = None, memory: int | None = None) -> Iterator[Spill]:
    """Within it, large tensors that passes make are written to a folder, and mapped.

    The outermost decides: within another one it has no effect.

    Args: those of `Spill`.
    """
    outer = _spill.get()
    if outer is not None:
        yield outer
        return
    spill = Spill(Path(folder), limit, memory)
    token = _spill.set(spill)
    try:
        yield spill
    finally:
        _spill.reset(token)


def memory_left() -> int | None:
    """Bytes that the process may still take under `Spill.memory`; None if nothing bounds it."""
    spill = _spill.get()
    if spill is None or spill.memory is None:
        return None
    release()
    return spill.memory - resident()


class Growing:
    """A tensor that is made block by block, in memory or on disk.

    Args:
        shape: of the whole.
    """

    def __init__(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self._spill, size = _spill.get(), math.prod(shape) * dtype.itemsize
        self._file: BinaryIO | None = None
        self._whole: Tensor | None = None
        if self._spill is not None and size >= _SMALLEST:
            self._spill.hold(size)
            with _explained(self._spill.folder):
                self._file = _unnamed(self._spill.folder)
        self._end = 0

    def append(self, block: Tensor) -> None:
        """The next rows, cast to the tensor's type."""
        block = block.to(self.dtype)
        if self._file is not None:
            assert self._spill is not None
            with _explained(self._spill.folder):
                self._file.write(block.cpu().contiguous().view(torch.uint8).numpy().data)
        elif block.shape == self.shape:
            self._whole = block.contiguous()
        else:
            self._whole = block.new_empty(self.shape) if self._whole is None else self._whole
            self._whole[self._end : self._end + len(block)] = block
            self._end += len(block)

    def finish(self) -> Tensor:
        """The whole tensor."""
        if self._file is None or self._spill is None:
            assert self._whole is not None
            return self._whole
        with _explained(self._spill.folder), self._file:
            self._file.flush()
            tensor = _mapped(self._file, self.shape, self.dtype)
        weakref.finalize(tensor.untyped_storage(), self._spill.free, tensor.nbytes)
        return on_disk(tensor)


def _unnamed(folder: Path) -> BinaryIO:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder, prefix="weights-")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpillError(
            f"cannot write weights to {folder}: {error.strerror or error}; give a folder on a disk that has "
            "room (--spill)"
        ) from error


def _mapped(file: BinaryIO, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What a file holds, which may be closed and nameless by now."""
    size = math.prod(shape)
    if os.name == "posix":  # a mapping of Python's would hold a file open for every tensor
        found = torch.from_file(f"/dev/fd/{file.fileno()}", shared=False, size=size, dtype=dtype)
    else:
        found = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=dtype)
    return found.view(shape)


def kept(tensor: Tensor) -> Tensor:
    """A tensor as it will lie from now on: on disk, within `spilling` and if it is large; else as it is."""
    if is_on_disk(tensor) or not tensor.dim():
        return tensor
    growing = Growing(tensor.shape, tensor.dtype)
    growing.append(tensor)
    return growing.finish()
