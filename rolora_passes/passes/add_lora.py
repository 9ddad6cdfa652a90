"""AddLoRA: low-rank branches beside chosen linears (Hu et al., 2021, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import fx

from rolora_passes.adapters.base_changes import change_base
from rolora_passes.adapters.exchange import branches_of, check_base, linears_of
from rolora_passes.adapters.lora import (
    add_branch,
    find_branches,
    low_rank,
    require_rank,
    weight_shapes,
    without,
)
from rolora_passes.adapters.peft_format import load_adapter
from rolora_passes.errors import PassError
from rolora_passes.graphs.axis_maps import LowRank
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import constants, finish, is_op, site_names
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.sites import attention_roles, by_name_only, is_head, last_parts, matches, named
from rolora_passes.passes.base import Kind, Pass, Report

_INITS = ("zero", "gaussian", "svd", "loftq")


@dataclass(frozen=True)
class AddLoRA(Pass):
    """Add y += (alpha / rank) · B A x to linears.

    Before:                       After:
        y = linear(x, W, b)           y' = linear(x, W, b)
                                      y = y' + linear(linear(x, A), B) * (alpha / rank)

    A [rank, in] and B [out, rank] are parameters like any other: fuse-norm and rotate treat them as
    they treat W, so LoRA before or after rotation is the order of two passes. Dropout is tune-lora's: a graph
    computes what is deployed.

    Options:
        targets: "all-linear" (every linear but the head and branches; routers, and gates of one number, only
            if a pattern names them); "queries", "keys", "values", what makes those of attention; or
            patterns over site names: the last part ("q_proj"), or a regular expression
            ("re:.*layers\\.[0-9]+\\.mlp.*").
        rank: the inner width of a branch.
        alpha: a branch is scaled by alpha / rank.
        rslora: scale by alpha / sqrt(rank) (rank-stabilised; Kalajdzievski, 2023).
        init: "zero": A Gaussian, B zero, so that the function is kept (PEFT's default draws A otherwise,
            Kaiming-uniform); "gaussian": both Gaussian, which changes the function; "svd": the largest
            singular values of W, which leave it, so that the function is kept (PiSSA, Meng et al., 2024);
            "loftq": the largest singular values of what a quantizer of the weight, not folded yet, took from
            it (LoftQ's last step, Li et al., 2023; the pass loftq alternates).
        seed: for the random start.
        adapter: a folder that PEFT, or `save_adapter`, wrote: its branches, carried into the bases that the
            graph's weights are in, in place of all options above. What else it changes is done too, before
            fold-constants: what a start (PiSSA, OLoRA, LoftQ) takes from the base's weights, as PEFT takes it
            when it loads; whole parameters (`modules_to_save`, biases, resized embeddings), and rows of new
            tokens. All other adapters are refused by the entry or the tensor that makes them so.

    Raises:
        PassError: no linear matches a target, rank exceeds a matched linear's size, "loftq" on a weight that
            no quantizer reads, or an adapter that is not of this base, not of this basis, or more than is
            said above.
    """

    name: ClassVar[str] = "add-lora"

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False
    init: Literal["zero", "gaussian", "svd", "loftq"] = "zero"
    seed: int = 0
    adapter: str | Path | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.init not in _INITS:
            found = f"rank {self.rank}, init {self.init!r}"
            raise PassError(f"add-lora: expected a positive rank and an init of {_INITS}, found {found}")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """Exact as long as B is zero, or the weight is less by what the branch gives."""
        return "exact" if self.init in ("zero", "svd") and self.adapter is None else "trained"

    @property
    def scale(self) -> float:
        """What a branch is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def run(self, graph: fx.GraphModule) -> Report:
        report = Report()
        found = self._made(graph, report) if self.adapter is None else self._loaded(graph, report)
        names, dtype = site_names(graph), dtype_of(graph)
        for node, branch in found.items():
            add_branch(graph, node, names[node], branch.to(dtype))
            report.changed.append(names[node])
        report.notes["parameters"] = sum(b.a.numel() + b.b.numel() for b in found.values())
        finish(graph)
        return report

    def _loaded(self, graph: fx.GraphModule, report: Report) -> dict[fx.Node, LowRank]:
        """The adapter's branches, in the graph's bases, once the base is what they were trained beside."""
        adapter = load_adapter(cast("str | Path", self.adapter))
        check_base(adapter, graph)
        linears = linears_of(adapter, graph)
        report.changed += change_base(graph, adapter, linears)  # first: gains may be among what it replaces
        return branches_of(adapter, graph, linears)

    def _made(self, graph: fx.GraphModule, report: Report) -> dict[fx.Node, LowRank]:
        """A branch for every linear that is meant, float64."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for node, (name, (out, width)) in self._chosen(graph, report).items():
            require_rank(self.rank, name, (out, width), self.name)
            if self.init in ("svd", "loftq"):
                found[node] = self._from_weight(graph, node, name)
                continue
            down = torch.randn(self.rank, width, generator=generator, dtype=torch.float64) / width**0.5
            up = torch.randn(out, self.rank, generator=generator, dtype=torch.float64) / self.rank**0.5
            up = up if self.init == "gaussian" else torch.zeros_like(up)
            found[node] = LowRank(down, up, self.scale)
        return found

    def _chosen(self, graph: fx.GraphModule, report: Report) -> dict[fx.Node, tuple[str, list[int]]]:
        """The linears that are meant, with their names and their weights' sizes; the others are reported."""
        names, shapes = site_names(graph), weight_shapes(graph)
        others = {n for branch in find_branches(graph) for n in (branch.low, branch.high)}
        roles = attention_roles(graph)
        wanted = {self.targets} if isinstance(self.targets, str) else set(self.targets)
        special = by_name_only(graph, infer_shapes(graph, only=constants(graph)))
        chosen = {}
        for node, name in names.items():
            by_role = bool(roles.get(node, set()) & wanted)
            if is_head(node) or node in others or not (by_role or matches(name, self.targets)):
                continue
            if node in special and not by_role and not named(name, self.targets):
                report.left.append((name, special[node]))
                continue
            chosen[node] = name, shapes[node]
        if not chosen:
            able = last_parts(name for n, name in names.items() if not is_head(n) and n not in others)
            head = "".join(f"; {name}, the head, takes none" for n, name in names.items() if is_head(n))
            raise PassError(
                f"add-lora: no linear matches {self.targets!r}; a branch can stand beside {', '.join(able)}, "
                f"and by what they make, queries, keys and values{head}"
            )
        return chosen

    def _from_weight(self, graph: fx.GraphModule, node: Any, name: str) -> LowRank:
        """The best branch for a weight, which is then less by it, or for what its quantizer took."""
        weight = node.args[1]
        if self.init == "loftq":
            inner = weight.args[0] if is_op(weight, "dequantize", "decode") else None
            if not is_op(inner, "quantize", "encode"):
                raise PassError(
                    f"add-lora: expected a quantizer, not folded yet, on the weight of {name}, found none: "
                    "init loftq goes after quantize-weights and before fold-constants; gptq folds its own"
                )
            exact, rounded = compute(graph, [inner.args[0], weight], dtype=torch.float32)
            return low_rank(exact - rounded, self.rank, self.scale)
        if weight not in constants(graph):
            raise PassError(f"add-lora: init svd takes from {name}, whose weight is quantized already")
        (exact,) = compute(graph, [weight], dtype=torch.float64)
        branch = low_rank(exact, self.rank, self.scale).to(dtype_of(graph))
        node.update_arg(1, without(graph, weight, name, branch, dtype_of(graph)))
        return branch
