"""QuantizeEmbedding: the token table in 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import constants, finish, is_op, root_names
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.numerics.affine import Integers
from rolora_passes.passes.base import Kind, Pass, Report
from rolora_passes.quantize.quantizers import quantize_weight, require_bits, require_float32, require_group


@dataclass(frozen=True)
class QuantizeEmbedding(Pass):
    """Round embedding tables to integers, symmetric.

    Before:                          After (folded):
        x = embedding(E, tokens)         x = embedding(dequantize(q, s), tokens)

    Options:
        bits (bits): width of the integers, 2 to 8 (the kernels have 4 and 8).
        group_size (channels): channels that share a scale; None: one scale per row.

    The embedding of a tied table gets a rounded copy: the linear still reads the table, or what
    quantize-weights makes of it. The report has every table; other matrices are for quantize-weights.

    Raises:
        PassError: the groups do not divide a table's rows.
    """

    kind: ClassVar[Kind] = "lossy"
    ensures: ClassVar[tuple[str, ...]] = ("embedding quantized",)
    forbids: ClassVar[tuple[str, ...]] = ("embedding quantized",)

    bits: int = 8
    group_size: int | None = None

    def __post_init__(self) -> None:
        require_bits(self.name, "bits", self.bits)
        if self.group_size is not None and self.group_size < 1:
            raise PassError(
                f"quantize-embedding: group_size must be positive or None, found {self.group_size}"
            )

    def run(self, graph: fx.GraphModule) -> Report:
        require_float32(graph, self.name)
        report = Report()
        known = constants(graph)
        shapes = infer_shapes(graph, only=known)
        for node in list(graph.graph.nodes):
            if not is_op(node, "embedding"):
                continue
            table = node.args[0]
            if table not in known:
                report.left.append((root_names(table)[0], "quantized already, or computed from the input"))
                continue
            name, width = root_names(table)[0], int(shapes[table].shape[-1])
            require_group(self.name, name, width, self.group_size)
            copy = ", a copy: something else reads the table too" if len(table.users) > 1 else ""
            node.update_arg(0, quantize_weight(graph, node, table, Integers(self.bits, self.group_size)))
            report.changed.append(f"{name}: {self.bits} bits{copy}")
        finish(graph)
        return report
