"""Lowerings to the ONNX standard alone (opset 23): what any conforming runtime computes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.emitter import Heads, Kernels, OnnxEmitter, Result
from rolora_passes.export.onnx.inputs import MaskedInputs
from rolora_passes.export.onnx.norms import norm_affine, norm_form, norm_pattern
from rolora_passes.export.onnx.prepared import Node
from rolora_passes.export.onnx.rotary import rotary_embedding, rotary_reads
from rolora_passes.export.onnx.standard import STANDARD, float_linear
from rolora_passes.export.onnx.weights import READS, KernelWeight, kernel_input, pack_signed, quantized_weight
from rolora_passes.graphs.graph import argument


def _linear(e: OnnxEmitter, node: Node) -> Result:
    bias, weight = argument(node, "bias"), quantized_weight(e.graph, node.args[1])
    if weight is None:
        return float_linear(e, node)
    x, level = kernel_input(e.graph, node)
    e.levels.add(level)
    product = e.op("MatMul", e.value(x), _dequantized(e, weight))
    return product if bias is None else e.op("Add", product, e.value(bias))


def _dequantized(e: OnnxEmitter, weight: KernelWeight) -> ir.Value:
    """The weight as [in, out], in the layout that runtimes fuse into one product with int4 weights."""
    width, group = int(weight.integers.shape[1]), weight.group_size
    inputs = [_stored(e, weight.name, weight.integers.T, weight.bits)]
    scale = weight.scale.T.contiguous() if group < width else weight.scale.flatten()
    inputs.append(e.store.add(f"{weight.name}.scale", scale))
    if weight.zero is not None:
        zero = weight.zero.T if group < width else weight.zero.flatten()
        inputs.append(_stored(e, f"{weight.name}.zero", zero, weight.bits))
    blocked: dict[str, Any] = {"axis": 0, "block_size": group} if group < width else {"axis": 1}
    return e.op("DequantizeLinear", *inputs, **blocked)


def _stored(e: OnnxEmitter, name: str, integers: torch.Tensor, bits: int) -> ir.Value:
    """int8 as INT4 where they fit."""
    if bits > 4:
        return e.store.add(name, integers.contiguous())
    return e.store.add(name, pack_signed(integers), ir.DataType.INT4, list(integers.shape))


def _embedding(e: OnnxEmitter, node: Node) -> Result:
    """Rows of int8, dequantized after they are looked up (no runtime looks up int4)."""
    weight = quantized_weight(e.graph, node.args[0])
    if weight is None:
        return STANDARD["embedding"](e, node)
    tokens, rank = e.value(node.args[1]), e.rank(node)
    parts = {"rows": weight.integers, "row_scale": weight.scale, "row_zero": weight.zero}
    found = {
        name: e.op("Gather", e.store.add(f"{weight.name}.{name}", part), tokens, axis=0)
        for name, part in parts.items()
        if part is not None
    }
    if weight.group_size == weight.integers.shape[1]:
        return _scaled_rows(e, found)
    kept = [0] * (rank - 1)
    count, group = int(weight.scale.shape[1]), weight.group_size
    split = {name: e.reshape(v, *kept, count, group if name == "rows" else 1) for name, v in found.items()}
    return e.reshape(_scaled_rows(e, split), *kept, count * group)


def _scaled_rows(e: OnnxEmitter, parts: dict[str, ir.Value]) -> ir.Value:
    rows, zero = (
        e.op("Cast", parts[name], to=ir.DataType.FLOAT) if name in parts else None
        for name in ("rows", "row_zero")
    )
    shifted = rows if zero is None else e.op("Sub", rows, zero)
    return e.op("Mul", shifted, parts["row_scale"])


def _rms_norm(e: OnnxEmitter, node: Node) -> Result:
    gain, _ = norm_affine(e, node)
    return e.op("RMSNormalization", e.value(node.args[0]), gain, **norm_form(node))


def _attention(e: OnnxEmitter, node: Node) -> Result:
    query, key, value = (argument(node, n) for n in ("query", "key", "value"))
    heads, kv_heads = int(e.shape(query)[2]), int(e.shape(key)[2])
    widths = int(e.shape(key)[3]), int(e.shape(value)[3])
    softcap = argument(node, "softcap")
    options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    options |= {"q_num_heads": heads, "kv_num_heads": kv_heads, "scale": argument(node, "scale")}
    parts = [e.flat(n) for n in (query, key, value)]
    if not e.inputs.cached:
        mask, causal = _mask(e, node, key)
        found = e.op("Attention", *parts, mask, is_causal=int(causal), **options)
        return Heads(found, heads, widths[1])
    if widths[0] != widths[1]:
        raise LoweringError("expected keys and values of one width in a cache, found different ones")
    assert isinstance(e.inputs, MaskedInputs)
    mask = e.inputs.visible(argument(node, "window"))
    past = e.inputs.cache(kv_heads, widths[0], key, value)
    outputs = e.ops("Attention", *parts, mask, *past, outputs=3, **options)
    e.inputs.present((outputs[1], outputs[2]), kv_heads, widths[0])
    return Heads(outputs[0], heads, widths[1])


def _mask(e: OnnxEmitter, node: Node, key: fx.Node) -> tuple[ir.Value | None, bool]:
    """What attention without a cache may see: keys that are tokens, and none behind a causal query."""
    assert isinstance(e.inputs, MaskedInputs)
    masked, causal = e.shape(key)[1] == "length", bool(argument(node, "causal"))
    window, itself = (
        argument(node, "window"),
        e.shape(argument(node, "query"))[1] == e.shape(key)[1],
    )
    if masked and itself and (causal or window is not None):
        return e.inputs.visible(window, causal), False
    if window is not None:
        raise LoweringError(
            "a sliding window is lowered for attention of the input tokens to themselves alone"
        )
    return (e.inputs.seen_keys(e.flat(argument(node, "query"))) if masked else None), causal


PORTABLE = Kernels(
    lowerings={
        **STANDARD,
        "linear": _linear, "embedding": _embedding, "rms_norm": _rms_norm,
        "attention": _attention, "rotary_embedding": rotary_embedding,
    },
    inputs=MaskedInputs,
    patterns=(norm_pattern,),
    reads={**READS, "rotary_embedding": rotary_reads},
)  # fmt: skip
