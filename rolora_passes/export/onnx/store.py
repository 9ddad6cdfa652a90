"""The tensors of an ONNX model: small ones inside it, large ones in one file beside it, equal ones once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

_INLINE = 1024  # bytes; shape inference reads constants inside the model alone
_ALIGNMENT = 64  # bytes; what vector instructions load from a mapped file
_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


class Store:
    """Makes the initializers of a model, and writes large ones to `folder / file` as they come.

    Args:
        folder: where the model will stand.
        file: the name of the data file in it.
    """

    def __init__(self, folder: Path, file: str) -> None:
        self.folder, self.file = folder, file
        self.values: list[ir.Value] = []
        self._names: dict[str, int] = {}
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0

    def add(
        self, name: str, tensor: Tensor, dtype: ir.DataType | None = None, shape: list[int] | None = None
    ) -> ir.Value:
        """An initializer under `name`, with a number if the name is taken.

        Args:
            tensor: the bytes to store.
            dtype, shape: what these are to ONNX, if not the tensor's own (packed int4).
        """
        name = self._unique(name)
        content = tensor.detach().contiguous()
        known, sizes = dtype or _TYPES[tensor.dtype], ir.Shape(list(tensor.shape) if shape is None else shape)
        held: ir.TensorProtocol
        if dtype is None and tensor.nbytes <= _INLINE:
            held = ir.Tensor(content.numpy(), name=name)
        else:
            place = self._place(content)
            held = ir.ExternalTensor(self.file, *place, known, shape=sizes, name=name, base_dir=self.folder)
        value = ir.Value(name=name, shape=sizes, type=ir.TensorType(known), const_value=held)
        self.values.append(value)
        return value

    def _unique(self, name: str) -> str:
        count = self._names[name] = self._names.get(name, -1) + 1
        return f"{name}.{count}" if count else name

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """Offset and length of a tensor's bytes in the file; a table that two read is written once."""
        content = tensor.flatten().view(torch.uint8).numpy().data
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if digest not in self._places:
            offset = -(-self._end // _ALIGNMENT) * _ALIGNMENT
            with (self.folder / self.file).open("ab") as file:
                file.write(bytes(offset - self._end))
                file.write(content)
            self._places[digest] = (offset, len(content))
            self._end = offset + len(content)
        return self._places[digest]
