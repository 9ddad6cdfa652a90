"""QuantizeActivations: 8-bit inputs for linears, asymmetric, per token, at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from rolora_passes.graphs.graph import finish, is_op, site_names
from rolora_passes.graphs.quantizers import quantize_per_token, require_float32
from rolora_passes.graphs.sites import matches, require_match
from rolora_passes.passes import Pass, Report


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Quantize and dequantize what linears with quantized weights read.

    Before:                              After:
        y = linear(x, dequantize(q, s))      xs, xz = choose_qparams_per_token_asymmetric(x, int8)
                                             xq = quantize_per_token(x, xs, xz)
                                             y = linear(dequantize_per_token(xq, xs, xz), dequantize(q, s))

    Linears that read one value share its quantizer.

    Options:
        targets: "all-linear", or patterns over site names.
    """

    kind: ClassVar[Literal["exact", "lossy"]] = "lossy"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "weights quantized")
    ensures: ClassVar[tuple[str, ...]] = ("activations quantized",)
    forbids: ClassVar[tuple[str, ...]] = ("activations quantized",)

    targets: str | tuple[str, ...] = "all-linear"

    def run(self, graph: fx.GraphModule) -> Report:
        require_float32(graph, self.name)
        report = Report()
        quantized: dict[fx.Node, fx.Node] = {}
        names = site_names(graph)
        require_match(self.name, self.targets, names.values())
        for node, name in names.items():
            if not matches(name, self.targets):
                report.left.append((name, "left in floating point by the options"))
            elif not is_op(node.args[1], "dequantize_per_channel_group", "dequantize_per_channel"):
                report.left.append((name, "its weight is in floating point"))
            else:
                value = node.args[0]
                assert isinstance(value, fx.Node)
                if value not in quantized:
                    quantized[value] = quantize_per_token(graph, value)
                node.update_arg(0, quantized[value])
                report.changed.append(name)
        finish(graph)
        return report
