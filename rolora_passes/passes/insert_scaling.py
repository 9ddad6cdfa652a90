"""InsertScaling: positive scalings that cancel, as parameters that training may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.bases.rotations import keep_rotation, load_rotations, only
from rolora_passes.graphs.bases.scalings import (
    Scaling,
    apply_scaling,
    energy,
    find_scalings,
    relative_energies,
)
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.expressions import Expressions
from rolora_passes.graphs.graph import add_parameter, aten, finish, insert_after, site_names
from rolora_passes.graphs.info import Rotation
from rolora_passes.passes.base import Calibration, Pass, Report
from rolora_passes.quantize.observers import watch


@dataclass(frozen=True)
class InsertScaling(Pass):
    """Divide what linears read by s = exp(t), and multiply their weights by s; t is a parameter.

    Before:                                 After:
        m = mul(silu(gate), linear(x, U))       s = exp(t)
        y = linear(m, D)                        m = mul(silu(gate), linear(x, div(U, s)))
                                                y = linear(m, mul(D, s))

    Scaling and rotation together reach more of what a quantizer can be given than either alone (OSTQuant, Hu
    et al., 2025), and both are folded. Wherever `find_scalings` finds one that keeps the function: between
    values and the output projection, between a gate's product and the down projection. What a norm writes
    can be scaled only while its gain is there to hold 1/s: insert-scaling belongs after fuse-norm, and then
    leaves it. learn-rotation trains t.

    Options:
        balance: start from s_j² = rms(x_j / ‖x‖) / ‖D_j‖, on the calibration tokens, times what makes log s
            zero in the mean; s_j = 1 where a channel is always zero. Once a rotation has spread them, the
            error of rounding x/s as D·s reads it, and that of rounding D·s as x/s meets it, are both in
            proportion to ‖x/s‖² ‖D·s‖², which is least there (Cauchy-Schwarz). GPTQ's own error is not: it is
            in proportion to ‖D·s‖² det(E[(x/s)(x/s)ᵀ])^(1/n), and s_j = 1 / ‖D_j‖ would be best.
        given: scales s to start from, a mapping or a file from `save_rotations`, keys "{site}.scale"; they
            take precedence.

    Raises:
        PassError: given scales that fit no site, have the wrong size, or are not positive; a value on the
            calibration tokens that is NaN or infinite, which names the site.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonical", "norms fused")
    ensures: ClassVar[tuple[str, ...]] = ("scalings inserted",)
    forbids: ClassVar[tuple[str, ...]] = ("scalings inserted", "hadamards inserted", "weights quantized")

    balance: bool = False
    given: str | Path | Mapping[str, Tensor] | None = None

    @property
    def needs_calibration(self) -> bool:
        return self.balance and self.given is None

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        scalings, names = find_scalings(graph), site_names(graph)
        free = [s for s in scalings if s.reason is None]
        sites = {reading.value: names[s.linears[0]] for s in free for reading in s.inputs}
        seen = {node: torch.zeros((), dtype=torch.float64) for node in sites}

        def see(node: fx.Node, value: Tensor) -> None:
            seen[node] = seen[node] + relative_energies(value).cpu()

        watch(graph, self.name, calibration.tokens, sites, see, calibration.on_progress)
        start = {_key(s, names): _balanced(graph, s, seen) for s in free}
        return self._insert(graph, scalings, start, "balanced")

    def run(self, graph: fx.GraphModule) -> Report:
        given = {} if self.given is None else dict(only("scale", load_rotations(self.given)))
        return self._insert(graph, find_scalings(graph), given, "given")

    def _insert(
        self, graph: fx.GraphModule, scalings: list[Scaling], start: dict[str, Tensor], method: str
    ) -> Report:
        """Scales at every site that takes them: these by key, made by this method, and ones."""
        report, expressions, names = Report(), Expressions(graph), site_names(graph)
        for scaling in scalings:
            site = ", ".join(names[n] for n in scaling.linears)
            if scaling.reason is not None:
                report.left.append((site, scaling.reason))
                continue
            key = _key(scaling, names)
            how = method if key in start else "ones"
            value = start.pop(key, torch.ones(scaling.size, dtype=torch.float64))
            if list(value.shape) != [scaling.size] or not bool((value > 0).all() & value.isfinite().all()):
                raise PassError(f"{self.name}: expected {key} to be {scaling.size} positive numbers")
            apply_scaling(graph, expressions, scaling, _parameter(graph, key, value.double(), how))
            report.changed.append(f"{site}: {scaling.size} scales")
            report.moved |= scaling.moved
        if start:
            raise PassError(f"{self.name}: given {sorted(start)[:3]} fit no scaling of this graph")
        finish(graph)
        return report


def _parameter(graph: fx.GraphModule, key: str, scale: Tensor, method: str) -> fx.Node:
    """s [n] as exp of a parameter, and its entry in the manifest."""
    node = add_parameter(graph, f"rotations.{key.replace('.', '_')}", scale.log().to(dtype_of(graph)))
    keep_rotation(graph, key, Rotation(method, str(node.target), scale))
    return insert_after(graph, node, aten.exp.default, node)


def _key(scaling: Scaling, names: Mapping[fx.Node, str]) -> str:
    return f"{names[scaling.linears[0]]}.scale"


def _balanced(graph: fx.GraphModule, scaling: Scaling, seen: Mapping[fx.Node, Tensor]) -> Tensor:
    """s [n] that makes as much of every channel of x/s as of D·s, x by its readings, D all that read it."""
    read = [seen[r.value].reshape(r.outer, scaling.size, r.inner).sum((0, 2)) for r in scaling.inputs]
    weights = [energy(graph, axis).cpu() for axis in scaling.weights]
    log = (torch.stack(read).sum(0).log() - torch.stack(weights).sum(0).log()) / 4
    usable = log.isfinite()
    return torch.where(usable, log - log[usable].mean(), 0.0).exp()
