"""Lowerings of operators that move values and change their sizes, in standard ONNX."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.emitter import Heads, Lowering, OnnxEmitter, Result
from rolora_passes.export.onnx.prepared import Node
from rolora_passes.graphs.graph import argument


def _unflatten(e: OnnxEmitter, node: Node) -> Result:
    x, dim, sizes = node.args
    rank = e.rank(x)
    axis = dim % rank
    if rank == 3 and axis == 2 and len(sizes) == 2:
        count, width = (int(n) for n in e.shape(node)[2:])
        return Heads(e.value(x), count, width)
    after = [int(n) for n in sizes]
    return e.reshape(e.value(x), *[0] * axis, *after, *tail(e, x, axis + 1))


def _flatten(e: OnnxEmitter, node: Node) -> Result:
    x = node.args[0]
    rank = e.rank(x)
    first, last = (argument(node, name) % rank for name in ("start_dim", "end_dim"))
    if (rank, first, last) == (4, 2, 3):
        return e.flat(x)
    if all(isinstance(size, int) for size in e.shape(x)[last + 1 :]):
        return e.reshape(e.value(x), *[0] * first, -1, *tail(e, x, last + 1))
    value = e.value(x)
    rest = e.op("Shape", value, start=last + 1)
    return e.op("Reshape", value, e.op("Concat", e.integers(*[0] * first, -1), rest, axis=0))


def tail(e: OnnxEmitter, node: Node, start: int) -> list[int]:
    """The sizes from an axis on."""
    sizes = e.shape(node)[start:]
    if not all(isinstance(size, int) for size in sizes):
        raise LoweringError(f"expected constant sizes behind axis {start}, found {sizes}")
    return [int(size) for size in sizes]


def _view(e: OnnxEmitter, node: Node) -> Result:
    return e.op("Reshape", e.value(node.args[0]), _sizes(e, node.args[1]))


def _expand(e: OnnxEmitter, node: Node) -> Result:
    kept = [1 if size == -1 else size for size in node.args[1]]  # what has that size already keeps it
    return e.op("Expand", e.value(node.args[0]), _sizes(e, kept))


def _sizes(e: OnnxEmitter, sizes: list[Any]) -> ir.Value:
    """A shape of numbers and of values that are known at run time: int64 [n]."""
    if all(isinstance(size, int) for size in sizes):
        return e.integers(*sizes)
    one = e.integers(1)
    parts = [e.integers(n) if isinstance(n, int) else e.op("Reshape", e.value(n), one) for n in sizes]
    return e.op("Concat", *parts, axis=0)


def _transpose(e: OnnxEmitter, node: Node) -> Result:
    rank = e.rank(node)
    order = list(range(rank))
    i, j = (node.args[1] % rank, node.args[2] % rank) if len(node.args) > 1 else (0, 1)
    order[i], order[j] = order[j], order[i]
    return e.op("Transpose", e.value(node.args[0]), perm=order)


def _permute(e: OnnxEmitter, node: Node) -> Result:
    return e.op("Transpose", e.value(node.args[0]), perm=[d % e.rank(node) for d in node.args[1]])


def _axes(kind: str) -> Lowering:
    """unsqueeze and squeeze of one axis"""
    return lambda e, node: e.op(kind, e.value(node.args[0]), e.integers(node.args[1]))


def _slice(e: OnnxEmitter, node: Node) -> Result:
    x, dim, start, end, step = (argument(node, n) for n in ("self", "dim", "start", "end", "step"))
    axis, start, end = dim % e.rank(node), start or 0, 2**62 if end is None else end
    if step != 1 or not isinstance(start, int) or not isinstance(end, int):
        raise LoweringError("only slices with constant bounds and step 1 are lowered")
    found = e.result(x)
    if isinstance(found, Heads) and axis == 2:
        count, width = int(e.shape(node)[2]), found.width
        return Heads(e.slice(e.flat(x), 2, start * width, (start + count) * width), count, width)
    return e.slice(e.value(x), axis, start, end)


def _cat(e: OnnxEmitter, node: Node) -> Result:
    parts = [e.value(part) for part in node.args[0]]
    return e.op("Concat", *parts, axis=argument(node, "dim", 0))


def _repeat_interleave(e: OnnxEmitter, node: Node) -> Result:
    x, count, dim = node.args[0], argument(node, "repeats"), argument(node, "dim")
    axis, rank = dim % e.rank(x), e.rank(x)
    times = [1] * (rank + 1)
    times[axis + 1] = count
    tiled = e.op("Tile", e.op("Unsqueeze", e.value(x), e.integers(axis + 1)), e.integers(*times))
    return e.reshape(tiled, *[0] * axis, -1, *tail(e, x, axis + 1))


def _repeat(e: OnnxEmitter, node: Node) -> Result:
    return e.op("Tile", e.value(node.args[0]), _sizes(e, node.args[1]))


def _size(e: OnnxEmitter, node: Node) -> Result:
    dim = argument(node, "dim")
    return e.op("Squeeze", e.op("Shape", e.value(node.args[0]), start=dim, end=dim + 1))


def _arange(e: OnnxEmitter, node: Node) -> Result:
    bounds = [e.value(a) for a in node.args]
    zero, one = (e.numbers(n, torch.int64) for n in (0, 1))
    return e.op("Range", *{1: [zero, *bounds, one], 2: [*bounds, one]}.get(len(bounds), bounds))


RESHAPING: dict[str, Lowering] = {
    "unflatten": _unflatten, "flatten": _flatten, "view": _view, "reshape": _view, "expand": _expand,
    "transpose": _transpose, "t": _transpose, "permute": _permute,
    "unsqueeze": _axes("Unsqueeze"), "squeeze": _axes("Squeeze"),
    "slice": _slice, "cat": _cat, "repeat_interleave": _repeat_interleave,
    "sym_size": _size, "arange": _arange, "repeat": _repeat,
}  # fmt: skip
