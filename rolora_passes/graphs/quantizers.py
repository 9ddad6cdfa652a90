"""Quantizers as graph nodes, in torch's own `quantized_decomposed` operators."""

from __future__ import annotations

import operator

import torch
import torch.ao.quantization.fx._decomposed
from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import aten, dtype_of, insert, insert_after

_decomposed = torch.ops.quantized_decomposed


def require_float32(graph: fx.GraphModule, name: str) -> None:
    """Check that a graph computes in the type that the kernels dequantize to.

    Raises:
        PassError: it does not; says how to convert it.
    """
    dtype = dtype_of(graph)
    if dtype != torch.float32:
        raise PassError(
            f"{name}: expected a graph in torch.float32, found {dtype}; "
            "convert it first: rolora_passes.graphs.convert(graph, torch.float32)"
        )


def quantize_weight(
    graph: fx.GraphModule, before: fx.Node, weight: fx.Node, bits: int, group: int | None, width: int
) -> fx.Node:
    """dequantize(quantize(W, s), s) before a node, for W [out, width]; returns the dequantized node.

    Args:
        group: input channels that share a scale, or None for one scale per output channel.
    """
    high = 2 ** (bits - 1) - 1
    low = -high - 1 if bits == 4 else -high  # the range of each kernel
    scale = insert(
        graph, before, torch.ops.rolora.choose_scale.default, weight, group or width, high, bool(group)
    )
    integers = insert(graph, before, torch.ops.rolora.quantize.default, weight, scale, low, high)
    if group:
        return insert(
            graph, before, _decomposed.dequantize_per_channel_group.default,
            integers, scale, None, low, high, torch.int8, group, torch.float32,
        )  # fmt: skip
    channel = insert(graph, before, aten.squeeze.dim, scale, -1)
    return insert(
        graph,
        before,
        _decomposed.dequantize_per_channel.default,
        integers,
        channel,
        None,
        0,
        low,
        high,
        torch.int8,
    )


def quantize_per_token(graph: fx.GraphModule, value: fx.Node) -> fx.Node:
    """int8, asymmetric, one scale and zero point per token (all but the last axis), chosen at run time."""
    chosen = insert_after(
        graph, value, _decomposed.choose_qparams_per_token_asymmetric.default, value, torch.int8
    )
    scale = insert_after(graph, chosen, operator.getitem, chosen, 0)
    zero = insert_after(graph, scale, operator.getitem, chosen, 1)
    quantized = insert_after(
        graph, zero, _decomposed.quantize_per_token.default, value, scale, zero, -128, 127, torch.int8
    )
    return insert_after(
        graph, quantized, _decomposed.dequantize_per_token.default,
        quantized, scale, zero, -128, 127, torch.int8, torch.float32,
    )  # fmt: skip
