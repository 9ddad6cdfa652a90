"""ObserveActivations: record the ranges of what linears read, for quantizers and SmoothQuant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import (
    add_parameter,
    constants,
    finish,
    insert_after,
    is_op,
    parameter_names,
    site_names,
)
from rolora_passes.graphs.sites import matches, require_match
from rolora_passes.passes.base import Calibration, Pass, Report
from rolora_passes.quantize.observers import Histogram, MinMax, Observer, Percentile, watch


@dataclass(frozen=True)
class ObserveActivations(Pass):
    """Run the calibration windows once, and write down the range of every value that linears read.

    Before:                     After:
        y = linear(x, W)            y = linear(observed(x, low, high), W)
        z = linear(x, V)            z = linear(observed(x, low, high), V)

    `observed` is the identity; low and high are parameters of the graph. Linears that read one value share
    its observer. Windows are run one at a time, and values are reduced as they are computed.

    Options:
        targets: "all-linear", or patterns over site names.
        per: a range for the whole value ("tensor": [1]), or for every channel of its last axis
            ("channel": [channels]; what SmoothQuant needs).
        method: "minmax"; "percentile", the (100 - percentile)th and percentile-th, exact, for which
            that part of every observed value is kept; "histogram", the range with the least squared
            error on 8 bits (per tensor only).
        percentile (%): for that method; more than 50, at most 100.

    Raises:
        PassError: targets that match no linear, a value that is NaN or infinite, or one that is empty in
            every window; names the site.
    """

    ensures: ClassVar[tuple[str, ...]] = ("activations observed",)

    targets: str | tuple[str, ...] = "all-linear"
    per: Literal["tensor", "channel"] = "tensor"
    method: Literal["minmax", "percentile", "histogram"] = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.per not in ("tensor", "channel"):
            raise PassError(f"{self.name}: per must be 'tensor' or 'channel', found {self.per!r}")
        if self.method not in ("minmax", "percentile", "histogram"):
            raise PassError(
                f"{self.name}: method must be 'minmax', 'percentile' or 'histogram', found {self.method!r}"
            )
        if self.method == "histogram" and self.per == "channel":
            raise PassError(
                f"{self.name}: method 'histogram' is per tensor; per channel, use 'minmax' or 'percentile'"
            )
        if not 50 < self.percentile <= 100:
            raise PassError(
                f"{self.name}: percentile must be more than 50 and at most 100, found {self.percentile}"
            )

    @property
    def needs_calibration(self) -> bool:
        return True

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        report = Report()
        sites = self._sites(graph, report)
        windows = len(calibration.tokens)
        observers = {value: self._observer(windows) for value in sites}
        names = {value: next(iter(readers.values())) for value, readers in sites.items()}

        def see(node: fx.Node, value: Tensor) -> None:
            observers[node].see(value.reshape(-1, value.shape[-1] if self.per == "channel" else 1))

        watch(graph, self.name, calibration.tokens, names, see, calibration.on_progress)
        for value, readers in sites.items():
            found = observers[value].range()
            if found is None:
                raise PassError(
                    f"{self.name}: the input of {names[value]} was empty in all {windows} windows of "
                    "calibration tokens, so it has no range: give more tokens, or leave it out of targets"
                )
            _write(graph, value, list(readers), names[value], *found)
            report.changed += readers.values()
        finish(graph)
        return report

    def _sites(self, graph: fx.GraphModule, report: Report) -> dict[fx.Node, dict[fx.Node, str]]:
        """The values to observe, each with the linears that read it and their names."""
        known = constants(graph)
        names = {n: name for n, name in site_names(graph).items() if n.args[0] not in known}
        require_match(self.name, self.targets, names.values())
        sites: dict[fx.Node, dict[fx.Node, str]] = {}
        for node, name in names.items():
            value = node.args[0]
            assert isinstance(value, fx.Node)
            if not matches(name, self.targets):
                report.left.append((name, "not observed by the options"))
            elif is_op(value, "observed"):
                report.left.append((name, "its input is observed already"))
            else:
                sites.setdefault(value, {})[node] = name
        return sites

    def _observer(self, windows: int) -> Observer:
        if self.method == "histogram":
            return Histogram()
        return MinMax() if self.method == "minmax" else Percentile(self.percentile, windows)


def _write(
    graph: fx.GraphModule, value: fx.Node, readers: list[fx.Node], name: str, low: Tensor, high: Tensor
) -> None:
    """Have linears read a value through a node that holds its range, float32 or wider."""
    stem = f"{name}_input" if name in parameter_names(graph) else f"{name}.input"
    ends = [
        add_parameter(graph, f"{stem}_{end}", bound.to(torch.promote_types(bound.dtype, torch.float32)))
        for end, bound in (("low", low), ("high", high))
    ]
    node = insert_after(graph, value, torch.ops.rolora.observed.default, value, *ends)
    for reader in readers:
        reader.update_arg(0, node)
