"""Lowerings to the operators that ONNX Runtime adds to the standard: its fused int4 decoder kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.emitter import Heads, Kernels, Lowering, Match, OnnxEmitter, Result
from rolora_passes.export.onnx.inputs import CompactInputs
from rolora_passes.export.onnx.norms import norm_affine, norm_form, norm_giving, norm_pattern
from rolora_passes.export.onnx.prepared import Node, Prepared
from rolora_passes.export.onnx.rotary import Rotary, rotary_embedding, rotary_reads, rotary_tables
from rolora_passes.export.onnx.standard import STANDARD, float_linear
from rolora_passes.export.onnx.weights import (
    READS,
    KernelWeight,
    blocks,
    kernel_groups,
    kernel_input,
    quantized_weight,
)
from rolora_passes.export.onnx.writer import MICROSOFT
from rolora_passes.graphs.graph import argument, is_op


def _linear(e: OnnxEmitter, node: Node) -> Result:
    bias, weight = argument(node, "bias"), quantized_weight(e.graph, node.args[1])
    if weight is None:
        return float_linear(e, node)
    x, level = kernel_input(e.graph, node)
    e.levels.add(level)
    return _matmul_nbits(e, e.value(x), weight, None if bias is None else e.value(bias), level)


def _matmul_nbits(
    e: OnnxEmitter, x: ir.Value, weight: KernelWeight, bias: ir.Value | None, level: int
) -> ir.Value:
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


def _embedding(e: OnnxEmitter, node: Node) -> Result:
    weight = quantized_weight(e.graph, node.args[0])
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


def _rms_norm(e: OnnxEmitter, node: Node) -> Result:
    gain, _ = norm_affine(e, node)
    return e.op("SimplifiedLayerNormalization", e.value(node.args[0]), gain, **norm_form(node), stash_type=1)


def _skip_norm_pattern(graph: Prepared, node: Node, lowerings: Mapping[str, Lowering]) -> Match | None:
    """A residual sum with the first norm that reads it: s = x + y, norm(s), as one kernel gives both."""
    norm = norm_giving(graph, node)
    if norm is None or norm_form(norm)["axis"] != -1 or not is_op(add := norm.args[0], "add"):
        return None
    operands = [a for a in add.args[:2] if isinstance(a, fx.Node) and a not in graph.constants]
    alike = len(operands) == 2 and all(graph.shapes[a] == graph.shapes[add] for a in operands)
    same_tokens = (norm in graph.narrowed) == (add in graph.narrowed)
    first = next(u for u in add.users if is_op(u, "rms_norm", "layer_norm"))
    if norm is not first or not alike or not same_tokens or graph.rank(add) != 3 or norm_giving(graph, add):
        return None
    return Match(add, (add, node), tuple(operands), lambda e: _skip_norm(e, norm, operands))


def _skip_norm(e: OnnxEmitter, norm: Node, operands: list[fx.Node]) -> tuple[ir.Value, ir.Value]:
    """The sum, and its norm with gain and bias."""
    gain, bias = norm_affine(e, norm)
    kind, affine = "SkipSimplifiedLayerNormalization", [gain]
    if is_op(norm, "layer_norm"):
        kind, affine = "SkipLayerNormalization", [gain, bias]
    values = [e.value(a) for a in operands]
    found = e.ops(kind, *values, *affine, domain=MICROSOFT, outputs=4, epsilon=norm_form(norm)["epsilon"])
    found[1].name = found[2].name = ""  # mean and deviation are for training; unnamed, they are left out
    return found[3], found[0]


# Attention


@dataclass(frozen=True)
class _Range:
    """Heads start .. end of a value [B, S, heads, width], not yet rotated."""

    source: fx.Node
    start: int
    end: int
    rotary: tuple[fx.Node, fx.Node, bool] | None


def _unrotated(graph: Prepared, node: Node) -> _Range:
    """Where the heads of a value come from, looking through slices of heads and one rotary embedding."""
    source, start, end = _heads_of(graph, node)
    if not is_op(source, "rotary_embedding"):
        return _Range(source, start, end, None)
    tables = tuple(argument(source, n) for n in ("cos", "sin", "interleaved"))
    inner, first, _ = _heads_of(graph, argument(source, "x"))
    return _Range(inner, first + start, first + end, tables)


def _heads_of(graph: Prepared, node: Any) -> tuple[fx.Node, int, int]:
    count = int(graph.shape(node)[2])
    if is_op(node, "slice") and argument(node, "dim") == 2:
        start = argument(node, "start") or 0
        return argument(node, "self"), start, start + count
    return node, 0, count


def _attention(e: OnnxEmitter, node: Node) -> Result:
    query, key, value, scale, causal, window, softcap = (
        argument(node, n) for n in ("query", "key", "value", "scale", "causal", "window", "softcap")
    )
    heads, kv_heads, width = (
        int(e.shape(query)[2]),
        int(e.shape(key)[2]),
        int(e.shape(query)[3]),
    )
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
    parts, rotary = _queries_keys_values(e.graph, node)
    given = _inputs(e, parts, width)
    tables: list[ir.Value] = []
    if rotary is not None:
        tables = list(rotary_tables(e, *rotary))
    past = inputs.cache(kv_heads, width, key, value)
    options = {"local_window_size": window} if window is not None else {}
    options |= {"rotary_interleaved": int(rotary[2])} if rotary is not None else {}
    options |= {"softcap": softcap} if softcap is not None else {}
    found = e.ops(
        "GroupQueryAttention", *given, *past, inputs.last_positions, inputs.total, *tables,
        domain=MICROSOFT, outputs=3, num_heads=heads, kv_num_heads=kv_heads, scale=scale,
        do_rotary=int(rotary is not None), **options,
    )  # fmt: skip
    inputs.present((found[1], found[2]), kv_heads, width)
    return Heads(found[0], heads, width)


def _queries_keys_values(graph: Prepared, node: Node) -> tuple[list[_Range], Rotary | None]:
    """Where the first three inputs of the kernel come from, and the rotary embedding left to it."""
    query, key, value = (argument(node, n) for n in ("query", "key", "value"))
    q, k, v = (_unrotated(graph, n) for n in (query, key, value))
    rotary = q.rotary
    alike = rotary is not None and k.rotary == rotary and v.rotary is None
    if rotary is not None and alike and _kernel_rotates(graph, rotary, int(graph.shape(query)[3])):
        return [q, k, v], rotary
    return [_Range(*_heads_of(graph, n), None) for n in (query, key, value)], None


def _attention_reads(graph: Prepared, node: Node) -> list[Node]:
    return [part.source for part in _queries_keys_values(graph, node)[0]]


def _inputs(e: OnnxEmitter, parts: list[_Range], width: int) -> list[ir.Value | None]:
    """The first three inputs; where all are neighbouring heads of one projection it is given whole."""
    q, k, v = parts
    ends = (0, q.end, k.end, v.end)
    together = q.source is k.source is v.source and (q.start, k.start, v.start) == ends[:3]
    if together and ends[3] == e.shape(q.source)[2]:
        return [e.flat(q.source), None, None]
    return [_flat_heads(e, part, width) for part in parts]


def _flat_heads(e: OnnxEmitter, part: _Range, width: int) -> ir.Value:
    whole = e.flat(part.source)
    if (part.start, part.end) == (0, e.shape(part.source)[2]):
        return whole
    return e.slice(whole, 2, part.start * width, part.end * width)


def _kernel_rotates(graph: Prepared, rotary: Rotary, width: int) -> bool:
    """Whether the kernel has this rotary embedding: from a table, over channels it can load."""
    tabled, half = rotary[0] in graph.tables and rotary[1] in graph.tables, graph.shape(rotary[0])[-1] // 2
    return bool(tabled and half % 8 == 0 and half <= width // 16 * 8)


def _silu(e: OnnxEmitter, node: Node) -> Result:
    return e.op("QuickGelu", e.value(node.args[0]), domain=MICROSOFT, alpha=1.0)


ORT = Kernels(
    lowerings={
        **STANDARD,
        "linear": _linear, "embedding": _embedding, "rms_norm": _rms_norm, "attention": _attention,
        "rotary_embedding": partial(rotary_embedding, domain=MICROSOFT), "silu": _silu,
    },
    inputs=CompactInputs,
    patterns=(_skip_norm_pattern, norm_pattern),
    reads={**READS, "attention": _attention_reads, "rotary_embedding": rotary_reads},
)  # fmt: skip
