"""InsertScaling: positive scalings that cancel, as parameters that training may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import (
    Expressions,
    add_parameter,
    aten,
    dtype_of,
    finish,
    insert_after,
    site_names,
)
from rolora_passes.graphs.rotations import load_rotations, only
from rolora_passes.graphs.scalings import Scaling, apply_scaling, find_scalings
from rolora_passes.passes import Pass, Report


@dataclass(frozen=True)
class InsertScaling(Pass):
    """Divide what linears read by s = exp(t), and multiply their weights by s; t is a parameter, 0 at first.

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
        given: scales s to start from, a mapping or a file from `save_rotations`, keys "{site}.scale".

    Raises:
        PassError: given scales that fit no site, have the wrong size, or are not positive.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonical", "norms fused")
    ensures: ClassVar[tuple[str, ...]] = ("scalings inserted",)
    forbids: ClassVar[tuple[str, ...]] = ("scalings inserted", "hadamards inserted", "weights quantized")

    given: str | Path | Mapping[str, Tensor] | None = None

    def run(self, graph: fx.GraphModule) -> Report:
        report, expressions, names = Report(), Expressions(graph), site_names(graph)
        given = {} if self.given is None else only("scale", load_rotations(self.given))
        for scaling in find_scalings(graph):
            site = ", ".join(names[n] for n in scaling.linears)
            if scaling.reason is not None:
                report.left.append((site, scaling.reason))
                continue
            key = f"{names[scaling.linears[0]]}.scale"
            scale = self._scale(graph, scaling, key, given.pop(key, None))
            apply_scaling(graph, expressions, scaling, scale)
            report.changed.append(f"{site}: {scaling.size} scales")
            report.moved |= scaling.moved
        if given:
            raise PassError(f"{self.name}: given {sorted(given)[:3]} fit no scaling of this graph")
        finish(graph)
        return report

    def _scale(self, graph: fx.GraphModule, scaling: Scaling, key: str, given: Tensor | None) -> fx.Node:
        """s [n] as exp of a parameter, and its entry in the manifest."""
        scale = torch.ones(scaling.size, dtype=torch.float64) if given is None else given.double()
        if list(scale.shape) != [scaling.size] or not bool((scale > 0).all() & scale.isfinite().all()):
            raise PassError(f"{self.name}: expected {key} to be {scaling.size} positive numbers")
        node = add_parameter(graph, f"rotations.{key.replace('.', '_')}", scale.log().to(dtype_of(graph)))
        about = {"size": scaling.size, "method": "ones" if given is None else "given", "tensor": node.target}
        graph.meta.setdefault("rotations", {})[key] = about
        graph.meta.setdefault("rotation_tensors", {})[key] = scale
        return insert_after(graph, node, aten.exp.default, node)
