"""Write a safetensors file one tensor at a time, its header first: no two need be in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from rolora_passes.errors import GraphFormatError

Form = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's type and shape, which the header needs before there is a tensor."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def form(value: Tensor) -> Form:
    """A tensor's type and shape."""
    return value.dtype, tuple(value.shape)


def size(form: Form) -> int:
    """Bytes of a tensor."""
    dtype, shape = form
    return dtype.itemsize * prod(shape)


def write_tensors(
    path: Path, forms: Mapping[str, Form], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors to a file in safetensors' format.

    Args:
        path: the file to write; nothing is moved, see `files.writing`.
        forms: of every tensor by name, in order; wide types are put first, which aligns all to their type.
        read: gives a tensor of that form, in the order of the file; it is let go once it is written.
        metadata: text by name.

    Raises:
        GraphFormatError: a type that the format lacks, or `read` gives another form than was said.
        OSError: the file cannot be written.
    """
    names = sorted(forms, key=lambda name: -forms[name][0].itemsize)
    with path.open("wb") as file:
        file.write(_header({name: forms[name] for name in names}, metadata))
        for name in names:
            value = read(name).detach()
            if form(value) != forms[name]:
                raise GraphFormatError(f"expected {name} as {forms[name]}, found {form(value)}")
            if value.numel():
                file.write(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            del value


def _header(forms: Mapping[str, Form], metadata: Mapping[str, str]) -> bytes:
    entries, start = dict[str, object](), 0
    for name, (dtype, shape) in forms.items():
        if dtype not in _NAMES:
            raise GraphFormatError(f"a safetensors file holds no tensor of {dtype}, which {name} is")
        stop = start + size((dtype, shape))
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
