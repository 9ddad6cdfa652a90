"""QuantizeKVCache: keys and values as a cache of few bits would hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import aten, finish, insert, is_op
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.passes.base import Kind, Pass, Report
from rolora_passes.quantize.quantizers import require_bits, require_float32


@dataclass(frozen=True)
class QuantizeKVCache(Pass):
    """Quantize and dequantize the keys and values that attention reads.

    Before:                            After:
        s = attention(q, k, v, scale)      s = attention(q, fake_quantize(k, 4), fake_quantize(v, 4), scale)

    Keys are quantized after rotary embedding, and after R3 where insert-hadamard put it. There is no cache in
    the graph yet: every token's keys and values are what a cache would give back.

    Options:
        keys, values (bits): width of the integers, 2 to 8, or None to leave them.
        per: "head": every head of a token has its own scale; "token": one scale for all heads.
        symmetric: a grid around zero; otherwise with a zero point.
        clip: multiplies the range (QuaRot: 0.95).
    """

    kind: ClassVar[Kind] = "lossy"
    ensures: ClassVar[tuple[str, ...]] = ("cache quantized",)
    forbids: ClassVar[tuple[str, ...]] = ("cache quantized",)

    keys: int | None = 4
    values: int | None = 4
    per: Literal["head", "token"] = "head"
    symmetric: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        require_bits(self.name, "keys", self.keys)
        require_bits(self.name, "values", self.values)
        if self.per not in ("head", "token"):
            raise PassError(f"{self.name}: per must be 'head' or 'token', found {self.per!r}")
        if not 0 < self.clip <= 1:
            raise PassError(f"{self.name}: clip must be above 0 and at most 1, found {self.clip}")

    def run(self, graph: fx.GraphModule) -> Report:
        require_float32(graph, self.name)
        report, shapes = Report(), infer_shapes(graph)
        for node in list(graph.graph.nodes):
            if not is_op(node, "attention"):
                continue
            for place, what, bits in ((1, "keys", self.keys), (2, "values", self.values)):
                if bits is None:
                    report.left.append((f"{node.name}: {what}", "left in floating point by the options"))
                    continue
                operand = node.args[place]
                node.update_arg(place, self._quantizer(graph, node, operand, bits, shapes[operand].shape))
                report.changed.append(f"{node.name}: {what}, {bits} bits")
        finish(graph)
        return report

    def _quantizer(
        self, graph: fx.GraphModule, before: fx.Node, value: fx.Node, bits: int, shape: torch.Size
    ) -> fx.Node:
        """The quantizer of keys or values [B, T, heads, head_dim]."""
        ops, known = torch.ops.rolora, (bits, None, self.symmetric, self.clip)
        if self.per == "head":
            return insert(graph, before, ops.fake_quantize.default, value, *known)
        token = insert(graph, before, aten.flatten.using_ints, value, 2)
        rounded = insert(graph, before, ops.fake_quantize.default, token, *known)
        heads = [int(shape[2]), int(shape[3])]
        return insert(graph, before, aten.unflatten.int, rounded, -1, heads)
