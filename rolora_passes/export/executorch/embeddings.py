"""Quantized embedding tables as ExecuTorch's kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rolora_passes.errors import LoweringError
from rolora_passes.extras import require
from rolora_passes.graphs.graph import argument, get_tensor, is_op, set_tensor
from rolora_passes.numerics.affine import limits
from rolora_passes.numerics.packing import pack_nibbles


def fuse_embeddings(graph: fx.GraphModule) -> None:
    """Look up rows of a quantized table and dequantize those alone, in place.

    Before:  embedding(dequantize(W int8 [V, d], scale [V, d/g], 8 or 4 bits), tokens)
    After:   embedding_byte(W, scale, tokens); embedding_4bit(W packed [V, d/2], scale, tokens)
    """
    require("executorch.exir.passes._quant_patterns_and_replacements", "executorch")
    quantized = torch.ops.quantized_decomposed
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        table, indices = node.args[:2]
        if not is_op(table, "dequantize"):
            continue
        stored, scale = (get_tensor(graph, a.target) for a in table.args[:2])
        bits = argument(table, "bits")
        if table.args[2] is not None or bits not in (4, 8):
            raise LoweringError(
                f"`{table.name}`: expected a symmetric embedding table of 4 or 8 bits, found "
                f"{bits} bits{'' if table.args[2] is None else ' with zero points'}"
            )
        kernel = quantized.embedding_byte.default
        if bits == 4:
            stored, kernel = _pack(stored), quantized.embedding_4bit.default
        with graph.graph.inserting_before(node):
            weight = _constant(graph, f"{table.args[0].target}.packed", stored)
            scales = _constant(graph, f"{table.args[1].target}.rows", _scales(scale))
            fused = graph.graph.call_function(kernel, (weight, scales, None, *limits(bits, True), indices))
        node.replace_all_uses_with(fused)
        graph.graph.erase_node(node)


def _constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    name = name.replace(".", "_")
    set_tensor(graph, name, value)
    return graph.graph.get_attr(name)


def _scales(scale: Tensor) -> Tensor:
    """[V, groups], and [V] where there is one group: how the kernels tell a row's scale."""
    return (scale[:, 0] if scale.shape[1] == 1 else scale).float()


def _pack(weight: Tensor) -> Tensor:
    """int8 [V, d] in [-8, 7] -> uint8 [V, d / 2]: value + 8, the even column in the high nibble."""
    if weight.shape[1] % 2:
        raise LoweringError(f"a 4-bit embedding needs an even width, found {tuple(weight.shape)}")
    return pack_nibbles(weight, high_first=True).bitwise_xor_(0x88)
