"""Rotate: one orthogonal matrix per free basis class, contracted into every parameter axis of the class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.bases.inference import BasisClass, infer_bases
from rolora_passes.graphs.bases.rotations import (
    add_rotation,
    check_orthogonal,
    load_rotations,
    only,
    rotation_key,
)
from rolora_passes.graphs.expressions import Expressions
from rolora_passes.graphs.graph import finish
from rolora_passes.numerics import hadamard
from rolora_passes.passes.base import Pass, Report

_METHODS = ("hadamard", "orthogonal", None)


@dataclass(frozen=True)
class Rotate(Pass):
    """Change the basis of the residual stream (R1), of every head (R2), and of what else is free.

    Before:                                After:
        x = embedding(E, tokens)               x = embedding(rotate(E, R1, 1), tokens)
        n = rms_norm(x, [d])                   n = rms_norm(x, [d])
        y = linear(n, W)                       y = linear(n, rotate(W, R1, 1))

    Classes come from basis inference, so biases, grouped-query heads, tied tables and adapters are
    not special. QuaRot (Ashkboos et al., 2024) rotates by a randomised Hadamard, SpinQuant (Liu et al.,
    2024) also the heads, by any orthogonal matrix.

    Options:
        residual, heads, others: how to draw the matrix for classes of that kind: "hadamard" (diag(±1)·H,
            applied by the fast transform; in blocks where no Hadamard of the full order is known),
            "orthogonal" (Haar), or None to leave them.
        seed: of the draws; every class draws from its own stream, so adding one changes no other.
        given: matrices that take precedence: a mapping or a file from `save_rotations` or SpinQuant,
            keys "R1", "model.layers.{i}.self_attn.R2". Keys of insert-hadamard and insert-scaling are theirs.

    Raises:
        PassError: a given matrix that fits no class, has the wrong size, or is not orthogonal.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonical", "norms fused")
    ensures: ClassVar[tuple[str, ...]] = ("rotated",)
    forbids: ClassVar[tuple[str, ...]] = ("rotated", "weights quantized")

    residual: str | None = "hadamard"
    heads: str | None = "hadamard"
    others: str | None = None
    seed: int = 0
    given: str | Path | Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        for option in ("residual", "heads", "others"):
            if getattr(self, option) not in _METHODS:
                found = getattr(self, option)
                raise PassError(f"rotate: {option} must be 'hadamard', 'orthogonal' or None, found {found!r}")

    def run(self, graph: fx.GraphModule) -> Report:
        report = Report()
        given = only("class", load_rotations(self.given)) if self.given is not None else {}
        bases, expressions = infer_bases(graph), Expressions(graph)
        keys = {rotation_key(c): c for c in bases.rotatable()}
        unknown = sorted(set(given) - set(keys))
        if unknown:
            raise PassError(
                f"rotate: given {unknown[:3]} fit no free class; this graph has {sorted(keys)[:6]}"
            )
        for cls in bases.classes:
            if cls.kind in ("residual", "head") and not cls.free:
                report.left.append((cls.name, cls.why_rigid()))
        for key, cls in keys.items():
            matrix, how = self._matrix(key, cls, given)
            if matrix is None:
                report.left.append((cls.name, f"left at {self._method(cls)} by the options"))
                continue
            how |= {"class": cls.name, "parameters": [str(p) for p in cls.parameters]}
            rotation = add_rotation(graph, key, matrix, **how)
            for axis in cls.parameters:
                expressions.wrap(axis.node, torch.ops.rolora.rotate.default, rotation, axis.dim, axis.inner)
            report.changed.append(f"{cls.name} ({key}, {cls.size}, {how['method']})")
            report.moved |= {node.name for node, _ in cls.values}
        finish(graph)
        return report

    def _method(self, cls: BasisClass) -> str | None:
        return {"residual": self.residual, "head": self.heads}.get(cls.kind, self.others)

    def _matrix(
        self, key: str, cls: BasisClass, given: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Signs [n] of a randomised Hadamard or a dense matrix [n, n], float64, and how it came about."""
        if key in given:
            return check_orthogonal(given[key], cls.size, key), {"method": "given"}
        method = self._method(cls)
        if method is None:
            return None, {}
        generator = torch.Generator().manual_seed(_stream(self.seed, key))
        if method == "hadamard":
            signs = torch.randint(0, 2, (cls.size,), generator=generator).double() * 2 - 1
            order = hadamard.largest_order(cls.size)
            return signs, {"method": method, "seed": self.seed, "construction": hadamard.describe(order)}
        gauss = torch.randn(cls.size, cls.size, dtype=torch.float64, generator=generator)
        q, r = torch.linalg.qr(gauss)
        return q * r.diagonal().sign(), {"method": method, "seed": self.seed}


def _stream(seed: int, key: str) -> int:
    """A seed of its own for every key, the same on every machine."""
    mixed = seed & 0xFFFFFFFF
    for byte in key.encode():
        mixed = (mixed * 1000003 ^ byte) & 0x7FFFFFFFFFFFFFFF
    return mixed
