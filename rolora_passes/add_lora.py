"""AddLoRA: low-rank branches beside chosen linears (Hu et al., 2021, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import (
    add_parameter,
    aten,
    constants,
    dtype_of,
    finish,
    insert_after,
    site_names,
)
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.sites import is_head, matches
from rolora_passes.passes import Pass, Report


@dataclass(frozen=True)
class AddLoRA(Pass):
    """Add y += (alpha / rank) · B A x to linears.

    Before:                       After:
        y = linear(x, W, b)           y' = linear(x, W, b)
                                      y = y' + linear(linear(x, A), B) * (alpha / rank)

    A [rank, in] and B [out, rank] are parameters like any other: fuse-norm and rotate treat them as
    they treat W, so LoRA before or after rotation is the order of two passes.

    Options:
        targets: "all-linear" (every linear but the head), or patterns over site names: the last part
            ("q_proj"), or a regular expression ("re:.*layers\\.[0-9]+\\.mlp.*").
        rank, alpha: of the branch; its scale is alpha / rank.
        init: "zero": A Gaussian, B zero, so that the function is kept (PEFT's default draws A otherwise,
            Kaiming-uniform); "gaussian": both Gaussian, which changes the function.
        seed: of the draws.

    Raises:
        PassError: no linear matches a target, or rank exceeds a matched linear's size.
    """

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 16
    alpha: float = 16.0
    init: Literal["zero", "gaussian"] = "zero"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.init not in ("zero", "gaussian"):
            found = f"rank {self.rank}, init {self.init!r}"
            raise PassError(
                f"add-lora: expected a positive rank and init 'zero' or 'gaussian', found {found}"
            )
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def exact(self) -> bool:
        """As long as B is zero."""
        return self.init == "zero"

    def run(self, graph: fx.GraphModule) -> Report:
        report = Report()
        generator = torch.Generator().manual_seed(self.seed)
        names, shapes = site_names(graph), infer_shapes(graph, only=constants(graph))
        chosen = {n: name for n, name in names.items() if matches(name, self.targets) and not is_head(n)}
        if not chosen:
            some = ", ".join(list(names.values())[:4])
            raise PassError(f"add-lora: no linear matches {self.targets!r}; sites are named like {some}")
        dtype = dtype_of(graph)
        for node, name in chosen.items():
            out, width = shapes[_weight(node)].shape
            if self.rank > min(out, width):
                raise PassError(f"add-lora: rank {self.rank} exceeds {name}, which is {out} x {width}")
            down = torch.randn(self.rank, width, generator=generator, dtype=torch.float64) / width**0.5
            up = torch.randn(out, self.rank, generator=generator, dtype=torch.float64) / self.rank**0.5
            up = up if self.init == "gaussian" else torch.zeros_like(up)
            a = add_parameter(graph, f"{name}.lora_A.weight", down.to(dtype))
            b = add_parameter(graph, f"{name}.lora_B.weight", up.to(dtype))
            self._branch(graph, node, a, b)
            report.changed.append(name)
        report.notes["parameters"] = sum(self.rank * sum(shapes[_weight(n)].shape) for n in chosen)
        finish(graph)
        return report

    def _branch(self, graph: fx.GraphModule, node: fx.Node, a: fx.Node, b: fx.Node) -> None:
        low = insert_after(graph, node, aten.linear.default, node.args[0], a)
        high = insert_after(graph, low, aten.linear.default, low, b)
        scaled = insert_after(graph, high, aten.mul.Tensor, high, self.alpha / self.rank)
        total = insert_after(graph, scaled, aten.add.Tensor, node, scaled)
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _weight(node: fx.Node) -> fx.Node:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return weight
