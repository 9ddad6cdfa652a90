"""Lowerings to the operators that ONNX Runtime adds to the standard: its fused int4 decoder kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.emitter import MICROSOFT, Emitter, Heads, Lowering, Node, Result
from rolora_passes.export.onnx.inputs import CompactInputs
from rolora_passes.export.onnx.norms import folded_norm, norm_affine, norm_form
from rolora_passes.export.onnx.ops import STANDARD, float_linear
from rolora_passes.export.onnx.rotary import Rotary, rotary_embedding, rotary_tables
from rolora_passes.export.onnx.weights import (
    Quantized,
    blocks,
    kernel_groups,
    kernel_input,
    quantized_weight,
)
from rolora_passes.graphs.graph import argument, is_op


def _linear(e: Emitter, node: Node) -> Result:
    bias, weight = argument(node, "bias"), quantized_weight(e, node.args[1])
    if weight is None:
        return float_linear(e, node)
    x, level = kernel_input(e, node)
    return _matmul_nbits(e, e.value(x), weight, None if bias is None else e.value(bias), level)


def _matmul_nbits(e: Emitter, x: ir.Value, weight: Quantized, bias: ir.Value | None, level: int) -> ir.Value:
    block, repeat = kernel_groups(weight)
    packed, scale, zero = blocks(weight, block, repeat)
    rows, width = weight.integers.shape
    if weight.bits != weight.stored_bits:
        e.note(f"weights of {weight.bits} bits are stored in {weight.stored_bits}, the kernels' next width")
    inputs = [
        e.store.add(weight.name, packed),
        e.store.add(f"{weight.name}.scale", scale),
        None if zero is None else e.store.add(f"{weight.name}.zero", zero),
        None,
        bias,
    ]
    while inputs[-1] is None:
        inputs.pop()
    sizes = {"K": int(width), "N": int(rows), "bits": weight.stored_bits, "block_size": block}
    return e.op("MatMulNBits", x, *inputs, domain=MICROSOFT, **sizes, accuracy_level=level)


def _embedding(e: Emitter, node: Node) -> Result:
    weight = quantized_weight(e, node.args[0])
    if weight is None:
        return STANDARD["embedding"](e, node)
    width = int(weight.integers.shape[1])
    block, repeat = kernel_groups(weight)
    packed, scale, zero = blocks(weight, block, repeat)
    inputs = [
        e.store.add(f"{weight.name}.rows", packed.flatten(1)[:, : width * weight.stored_bits // 8]),
        e.value(node.args[1]),
        e.store.add(f"{weight.name}.scale", scale),
    ]
    if zero is not None:
        inputs.append(e.store.add(f"{weight.name}.zero", zero))
    return e.op(
        "GatherBlockQuantized", *inputs, domain=MICROSOFT,
        bits=weight.stored_bits, block_size=block, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _rms_norm(e: Emitter, node: Node) -> Result:
    gain, _ = norm_affine(e, node)
    return e.op("SimplifiedLayerNormalization", e.value(node.args[0]), gain, **norm_form(node), stash_type=1)


def _add(e: Emitter, node: Node) -> Result:
    """A residual sum with the norm that reads it, in one kernel."""
    norm = next((u for u in node.users if is_op(u, "rms_norm", "layer_norm")), None)
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and a not in e.constants]
    alike = len(operands) == 2 and all(e.shapes[a] == e.shapes[node] for a in operands)
    same_tokens = (norm in e.narrowed) == (node in e.narrowed)
    fused = alike and same_tokens and e.rank(node) == 3 and not folded_norm(e, node)
    if norm is None or norm_form(norm)["axis"] != -1 or not fused:
        return STANDARD["add"](e, node)
    gain, bias = norm_affine(e, norm)
    kind, affine = "SkipSimplifiedLayerNormalization", [gain]
    if is_op(norm, "layer_norm"):
        kind, affine = "SkipLayerNormalization", [gain, bias]
    values = [e.value(a) for a in operands]
    found = e.ops(kind, *values, *affine, domain=MICROSOFT, outputs=4, epsilon=norm_form(norm)["epsilon"])
    found[1].name = found[2].name = ""  # mean and deviation are for training; unnamed, they are left out
    e.results[norm] = found[0]
    return found[3]


# Attention


@dataclass(frozen=True)
class _Range:
    """Heads start .. end of a value [B, S, heads, width], not yet rotated."""

    source: fx.Node
    start: int
    end: int
    rotary: tuple[fx.Node, fx.Node, bool] | None


def _unrotated(e: Emitter, node: Node) -> _Range:
    """Where the heads of a value come from, looking through slices of heads and one rotary embedding."""
    source, start, end = _heads_of(e, node)
    if not is_op(source, "rotary_embedding"):
        return _Range(source, start, end, None)
    tables = tuple(argument(source, n) for n in ("cos", "sin", "interleaved"))
    inner, first, _ = _heads_of(e, argument(source, "x"))
    return _Range(inner, first + start, first + end, tables)


def _heads_of(e: Emitter, node: Any) -> tuple[fx.Node, int, int]:
    count = int(e.shape(node)[2])
    if is_op(node, "slice") and argument(node, "dim") == 2:
        start = argument(node, "start") or 0
        return argument(node, "self"), start, start + count
    return node, 0, count


def _attention(e: Emitter, node: Node) -> Result:
    query, key, value, scale, causal, window, softcap = (
        argument(node, n) for n in ("query", "key", "value", "scale", "causal", "window", "softcap")
    )
    heads, kv_heads, width = int(e.shape(query)[2]), int(e.shape(key)[2]), int(e.shape(query)[3])
    if not causal or e.shape(value)[3] != width:
        raise LoweringError(
            "expected causal attention with keys and values of one width, as GroupQueryAttention is, found "
            f"{'values of another width' if causal else 'attention both ways'}: take flavor='portable'"
        )
    if width % 8:
        raise LoweringError(
            f"expected heads of a multiple of 8 channels, which GroupQueryAttention has, found {width}: take "
            "flavor='portable'"
        )
    inputs = e.inputs
    assert isinstance(inputs, CompactInputs)
    parts, rotary = _queries_keys_values(e, query, key, value)
    tables: list[ir.Value] = []
    if rotary is not None:
        tables = list(rotary_tables(e, *rotary))
    past = inputs.cache(kv_heads, width, key, value)
    options = {"local_window_size": window} if window is not None else {}
    options |= {"rotary_interleaved": int(rotary[2])} if rotary is not None else {}
    options |= {"softcap": softcap} if softcap is not None else {}
    found = e.ops(
        "GroupQueryAttention", *parts, *past, inputs.last_positions, inputs.total, *tables,
        domain=MICROSOFT, outputs=3, num_heads=heads, kv_num_heads=kv_heads, scale=scale,
        do_rotary=int(rotary is not None), **options,
    )  # fmt: skip
    inputs.present((found[1], found[2]), kv_heads, width)
    return Heads(found[0], heads, width)


def _queries_keys_values(
    e: Emitter, query: fx.Node, key: fx.Node, value: fx.Node
) -> tuple[list[ir.Value | None], Rotary | None]:
    """The first three inputs of the kernel, and the rotary embedding left to it.

    Where all three are neighbouring heads of one projection it is given whole.
    """
    q, k, v = (_unrotated(e, n) for n in (query, key, value))
    width = int(e.shape(query)[3])
    rotary = q.rotary
    if rotary is None or k.rotary != rotary or v.rotary is not None or not _kernel_rotates(e, rotary, width):
        rotary = None
        q, k, v = (_Range(*_heads_of(e, n), None) for n in (query, key, value))
    ends = (0, q.end, k.end, v.end)
    together = q.source is k.source is v.source and (q.start, k.start, v.start) == ends[:3]
    if together and ends[3] == e.shape(q.source)[2]:
        return [e.flat(q.source), None, None], rotary
    return [_flat_heads(e, part, width) for part in (q, k, v)], rotary


def _flat_heads(e: Emitter, part: _Range, width: int) -> ir.Value:
    whole = e.flat(part.source)
    if (part.start, part.end) == (0, e.shape(part.source)[2]):
        return whole
    return e.slice(whole, 2, part.start * width, part.end * width)


def _kernel_rotates(e: Emitter, rotary: Rotary, width: int) -> bool:
    """Whether the kernel has this rotary embedding: from a table, over channels it can load."""
    tabled, half = rotary[0] in e.tables and rotary[1] in e.tables, e.shape(rotary[0])[-1] // 2
    return bool(tabled and half % 8 == 0 and half <= width // 16 * 8)


def _silu(e: Emitter, node: Node) -> Result:
    return e.op("QuickGelu", e.value(node.args[0]), domain=MICROSOFT, alpha=1.0)


ORT: dict[str, Lowering] = {
    **STANDARD,
    "linear": _linear, "embedding": _embedding, "add": _add, "rms_norm": _rms_norm,
    "attention": _attention, "rotary_embedding": partial(rotary_embedding, domain=MICROSOFT), "silu": _silu,
}  # fmt: skip
