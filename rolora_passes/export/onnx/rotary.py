"""Rotary embeddings as ONNX has them: with a table of every position's cosines and sines."""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.emitter import Heads, OnnxEmitter, Result
from rolora_passes.export.onnx.prepared import Node, Prepared
from rolora_passes.graphs.graph import argument

Rotary = tuple[fx.Node, fx.Node, bool]
"""cos, sin, interleaved"""


def rotary_tables(e: OnnxEmitter, cos: fx.Node, sin: fx.Node, interleaved: bool) -> tuple[ir.Value, ir.Value]:
    """cos and sin of every position and angle, [max_length, R / 2] each; ours give each angle twice.

    Raises:
        LoweringError: they are not tables with a row for each position.
    """
    found = []
    for node in (cos, sin):
        if node not in e.graph.tables:
            raise LoweringError(f"expected rotary angles that depend on positions alone, found `{node.name}`")
        key = ("rotary", node, interleaved)
        if key not in e.shared:
            values, _ = e.graph.tables[node]
            table = values.reshape(values.shape[-2:])
            half = table[:, ::2] if interleaved else table[:, : table.shape[1] // 2]
            e.shared[key] = e.store.add(f"rotary.{node.name}", half.float())
        found.append(e.shared[key])
    return found[0], found[1]


def rotary_embedding(e: OnnxEmitter, node: Node, domain: str = "") -> Result:
    """The standard's operator, or ONNX Runtime's older one, which takes the positions first."""
    x, cos, sin, interleaved = (argument(node, n) for n in ("x", "cos", "sin", "interleaved"))
    if cos not in e.graph.tables and not interleaved:
        return _products(e, x, cos, sin)
    tables, positions = rotary_tables(e, cos, sin, interleaved), e.inputs.positions
    count, width = int(e.shape(node)[2]), int(e.shape(node)[3])
    rotated = int(e.shape(cos)[-1])
    partial = {"rotary_embedding_dim": rotated} if rotated < width else {}
    inputs = (positions, *tables) if domain else (*tables, positions)
    options = {"interleaved": int(interleaved), "num_heads": count, **partial}
    return Heads(e.op("RotaryEmbedding", e.flat(x), *inputs, domain=domain, **options), count, width)


def _products(e: OnnxEmitter, x: fx.Node, cos: fx.Node, sin: fx.Node) -> Result:
    """x·cos + (-x₂, x₁)·sin, where the angles are made in the graph."""
    value, width, rotated = e.value(x), int(e.shape(x)[-1]), int(e.shape(cos)[-1])
    wide_cos, wide_sin = (e.op("Unsqueeze", e.value(angle), e.integers(-2)) for angle in (cos, sin))
    first, second = e.slice(value, 3, 0, rotated // 2), e.slice(value, 3, rotated // 2, rotated)
    turned = value if rotated == width else e.slice(value, 3, 0, rotated)
    partner = e.op("Concat", e.op("Neg", second), first, axis=-1)
    result = e.op("Add", e.op("Mul", turned, wide_cos), e.op("Mul", partner, wide_sin))
    if rotated == width:
        return result
    return e.op("Concat", result, e.slice(value, 3, rotated, width), axis=-1)


def rotary_reads(graph: Prepared, node: Node) -> list[Node]:
    """Angles come from tables, where they depend on positions alone."""
    x, cos, sin = (argument(node, n) for n in ("x", "cos", "sin"))
    return [x, *(angle for angle in (cos, sin) if angle not in graph.tables)]
