"""A tensor's bytes as ExecuTorch's serialiser takes data that is not in memory."""

from __future__ import annotations

import hashlib
import io

import torch
from executorch.exir._serialize._cord import FileBackedData
from torch import Tensor

from rolora_passes.ondisk import kept, rest

_CHUNK = 1 << 24  # bytes written at a time


class Held(FileBackedData):  # type: ignore[misc]
    """The bytes of a tensor, which are copied when the program is written, and not before.

    Within `rolora_passes.ondisk.spilling` a large tensor lies on disk until then.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = kept(tensor)
        self._bytes = self._tensor.flatten().view(torch.uint8)
        digest = hashlib.sha256(self._bytes.numpy().data)
        rest(self._tensor)
        self._size, self._sha256 = self._bytes.numel(), digest.digest()

    def prefix(self, size: int) -> bytes:
        return self._bytes[:size].numpy().tobytes()

    def to_bytes(self) -> bytes:
        return self._bytes.numpy().tobytes()

    def write_to_file(self, outfile: io.BufferedIOBase) -> None:
        for part in self._bytes.split(_CHUNK):
            outfile.write(part.numpy().data)
            rest(self._tensor, part)

    def close(self) -> None:
        """Nothing is open."""
