"""How a cache holds keys or values: in float32, or in int8 with a scale for each token and head.

The int8 cache is read back into float32, as far as it is filled, before every attention. ExecuTorch also has
an attention over int8 (`llama.custom_quantized_sdpa`). It rounds the queries too, which no graph here says,
and off ARM it has no fast loops: with 9 heads of 64 and 3 of keys, on x86, 128 tokens took 25.8 ms where
this takes 1.4 (float32: 1.3), and one token after 511 took 0.48 ms where this takes 0.16 (float32: 0.07).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.graphs.graph import argument, beside, is_op, set_tensor
from rolora_passes.graphs.shapes import Shape

_aten, _quantized = torch.ops.aten, torch.ops.quantized_decomposed

_INT8 = {"bits": 8, "group_size": None, "symmetric": False, "clip": 1.0}
_RANGE = (-128, 127, torch.int8)


@dataclass(frozen=True)
class Held:
    """What a cache is to hold: the value an attention reads, without its quantizer."""

    value: fx.Node
    int8: bool


@dataclass(frozen=True)
class Cache:
    """Buffers [1, max_length, heads, ..]: float32; or int8, scales float32 and zero points int8."""

    parts: tuple[fx.Node, ...]


def held(attention: fx.Node, what: str) -> Held:
    """The keys ("key") or values ("value") of an attention, as a cache can hold them.

    Raises:
        LoweringError: they are quantized in a way no cache has.
    """
    value = argument(attention, what)
    rounded = value.args[0] if is_op(value, "unflatten") else value
    if not is_op(rounded, "fake_quantize"):
        return Held(value, int8=False)
    found = {name: argument(rounded, name) for name in _INT8}
    if rounded is value and found == _INT8:
        return Held(value.args[0], int8=True)
    kind = "symmetric" if found["symmetric"] else "asymmetric"
    group = found["group_size"]
    owner = "token" if rounded is not value else "head" if group is None else f"{group} channels"
    raise LoweringError(
        f"`{attention.name}`: ExecuTorch's cache holds float32, or int8 with one scale for each token and "
        f"head, asymmetric, without clip; found {what}s of {found['bits']} bits, {kind}, clip "
        f"{found['clip']}, one scale for each {owner}: choose quantize-kv-cache with keys: 8, values: 8, "
        "per: head, symmetric: false, clip: 1.0, or leave it out of what is lowered"
    )


def write_cache(
    module: fx.GraphModule, name: str, fresh: Held, shape: Shape, start: fx.Node, max_length: int
) -> Cache:
    """Make a cache and write fresh rows [1, S, heads, width] into it, from row `start` on.

    Float:  update_cache(k, cache, start)
    int8:   s, z = choose_qparams_per_token_asymmetric(k)
            update_cache(quantize_per_token(k, s, z), cache, start)
            update_cache(to(s, float32), scales, start); update_cache(to(z, int8), zeros, start)
    """
    _, _, heads, width = shape
    if heads is None or width is None:
        raise LoweringError(f"`{fresh.value.name}` has no static heads and head_dim: {shape}")
    call, buffers = module.graph.call_function, []
    rows = (
        _quantize(module.graph, name, fresh.value, width)
        if fresh.int8
        else [(name, fresh.value, width, None)]
    )
    for target, row, size, dtype in rows:
        zeros = torch.zeros(1, max_length, heads, size, dtype=dtype)
        set_tensor(module, target, beside(module, zeros))
        buffers.append(module.graph.get_attr(target))
        call(torch.ops.llama.update_cache.default, (row, buffers[-1], start))
    return Cache(tuple(buffers))


def _quantize(
    graph: fx.Graph, name: str, value: fx.Node, width: int
) -> list[tuple[str, fx.Node, int, torch.dtype | None]]:
    """(name, rows, width, type) of the integers, scales and zero points of a value."""
    call = graph.call_function
    chosen = call(_quantized.choose_qparams_per_token_asymmetric.default, (value, torch.int8))
    scale, zero = (call(operator.getitem, (chosen, i)) for i in (0, 1))
    integers = call(_quantized.quantize_per_token.default, (value, scale, zero, *_RANGE))
    narrow_scale = call(_aten.to.dtype, (scale, torch.float32))
    narrow_zero = call(_aten.to.dtype, (zero, torch.int8))
    return [
        (name, integers, width, torch.int8),
        (f"{name}_scale", narrow_scale, 1, torch.float32),
        (f"{name}_zero", narrow_zero, 1, torch.int8),
    ]


def read_cache(graph: fx.Graph, cache: Cache, end: fx.Node | None) -> fx.Node:
    """Rows 0 .. end - 1 of a cache, or all if `end` is None, in float32 as attention reads them."""
    call, parts = graph.call_function, cache.parts
    if end is not None:
        parts = tuple(call(_aten.narrow.default, (part, 1, 0, end)) for part in parts)
    if len(parts) == 1:
        return parts[0]
    scale = call(_aten.to.dtype, (parts[1], torch.float64))
    zero = call(_aten.to.dtype, (parts[2], torch.int64))
    arguments = (parts[0], scale, zero, *_RANGE, torch.float32)
    return call(_quantized.dequantize_per_token.default, arguments)


def cache_of(read: fx.Node) -> fx.Node:
    """The buffer of the values (not of their scales) that `read_cache` reads."""
    while read.op != "get_attr":
        read = read.args[0]  # type: ignore[assignment]
    return read
