"""Reading a GGUF file once, where transformers reads it anew at every step.

Its metadata takes seconds to parse (a string for each token), and transformers parses it for the
configuration, for the tokenizer, and for the weights. It also builds the table of tensor names again for
every module. Both are remembered here while they are of use: SmolLM2-135M loads in 7 CPU-seconds, not in 35.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any


def reader(path: Path) -> Any:
    """The `gguf.GGUFReader` of a file, the same one until `forget` or until the file changes."""
    state = path.stat()
    return _reader(path.resolve(), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _reader(path: Path, changed: int, size: int) -> Any:
    import gguf

    return gguf.gguf_reader.GGUFReader(path)


def forget() -> None:
    """Let go of what was read: as long as a file's metadata, in small arrays."""
    _reader.cache_clear()


@contextmanager
def read_once() -> Iterator[None]:
    """Give transformers the reader, and the names of tensors, that are there already."""
    import gguf

    package: Any = gguf
    theirs = package.GGUFReader, package.get_tensor_name_map
    package.GGUFReader, package.get_tensor_name_map = lambda path: reader(Path(path)), lru_cache(theirs[1])
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = theirs
