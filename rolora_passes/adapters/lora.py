"""Low-rank branches of a graph: found by structure, written, and what makes the best one for a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.axis_maps import LowRank
from rolora_passes.graphs.devices import seeded
from rolora_passes.graphs.graph import (
    KEPT,
    add_parameter,
    aten,
    constants,
    insert_after,
    is_op,
    linears,
    op_name,
    site_names,
)
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.sites import matches

_OVERSAMPLING, _ITERATIONS = 8, 4


@dataclass(frozen=True)
class Branch:
    """y' = linear(x, W, b) + linear(linear(x, A), B) * scale, as nodes.

    Attributes:
        linear: of W.
        low, high: the linears of A and B.
        total: the sum.
        scale: of the branch.
    """

    linear: fx.Node
    low: fx.Node
    high: fx.Node
    total: fx.Node
    scale: float


def require_rank(rank: int, name: str, shape: tuple[int, int], step: str) -> None:
    """Refuse a rank that is more than a weight [out, in] can have.

    Raises:
        PassError: says which weight, of which size.
    """
    if rank > min(shape):
        raise PassError(f"{step}: rank {rank} exceeds {name}, which is {shape[0]} x {shape[1]}")


def find_branches(graph: fx.GraphModule) -> list[Branch]:
    """Every low-rank branch beside a linear that nothing else reads, in graph order.

    It does not matter what made them, nor in which basis they are, nor whether weights are quantized. The
    base of a second branch on one linear is the first one's sum, and its `linear` the same linear.
    """
    known, totals, found = constants(graph), dict[fx.Node, fx.Node](), list[Branch]()
    sites = {*linears(graph)}  # and not what makes a merged bias, which looks like a branch
    for node in graph.graph.nodes:
        branch = _branch(node, known, totals)
        if branch is not None and sites.issuperset((branch.linear, branch.low, branch.high)):
            totals[branch.total] = branch.linear
            found.append(branch)
    return found


def unnamed_branches(graph: fx.GraphModule, targets: str | Sequence[str]) -> set[fx.Node]:
    """The linears of branches that targets do not name: "all-linear" means the model's own."""
    names, patterns = site_names(graph), [targets] if isinstance(targets, str) else targets
    named = [pattern for pattern in patterns if pattern != "all-linear"]
    halves = {n for branch in find_branches(graph) for n in (branch.low, branch.high)}
    return {n for n in halves if not matches(names[n], named)}


def _branch(node: fx.Node, known: set[fx.Node], totals: dict[fx.Node, fx.Node]) -> Branch | None:
    if not is_op(node, "add"):
        return None
    for base, scaled in (node.args[:2], node.args[1::-1]):
        if not (is_op(scaled, "mul") and is_op(scaled.args[0], "linear") and list(base.users) == [node]):
            continue
        high, scale = scaled.args[:2]
        low, linear = high.args[0], totals.get(base, base)
        if not (is_op(low, "linear") and is_op(linear, "linear") and isinstance(scale, (int, float))):
            continue
        tensors = {a for n in (linear, low, high) for a in n.args[1:] if a is not None}
        if _read(low) is _read(linear) and all(t in known or op_name(t) in KEPT for t in tensors):
            return Branch(linear, low, high, node, float(scale))
    return None


def _read(linear: fx.Node) -> Any:
    """What a linear reads, before a quantizer rounds it."""
    value: Any = linear.args[0]
    return value.args[0] if is_op(value, "fake_quantize", "fake_quantize_static") else value


def add_branch(graph: fx.GraphModule, linear: fx.Node, name: str, branch: LowRank) -> None:
    """Write a branch beside a linear: parameters `{name}.lora_A.weight` [rank, in], `{name}.lora_B.weight`
    [out, rank], and `.bias` of either where it has one. It reads what the linear does, before a quantizer."""
    nodes = {}
    for part, tensor in (
        ("lora_A.weight", branch.a), ("lora_A.bias", branch.inner),
        ("lora_B.weight", branch.b), ("lora_B.bias", branch.outer),
    ):  # fmt: skip
        nodes[part] = None if tensor is None else add_parameter(graph, f"{name}.{part}", tensor)
    low = insert_after(graph, linear, aten.linear.default, _read(linear), *_of(nodes, "lora_A"))
    high = insert_after(graph, low, aten.linear.default, low, *_of(nodes, "lora_B"))
    scaled = insert_after(graph, high, aten.mul.Tensor, high, branch.scale)
    total = insert_after(graph, scaled, aten.add.Tensor, linear, scaled)
    linear.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _of(nodes: dict[str, fx.Node | None], half: str) -> list[fx.Node]:
    return [n for part in ("weight", "bias") if (n := nodes[f"{half}.{part}"]) is not None]


def low_rank(matrix: Tensor, rank: int, scale: float) -> LowRank:
    """The branch nearest to a matrix [out, in] in the Frobenius norm, its halves equally large.

    By singular values (Eckart and Young), from a randomised range finder (Halko et al., 2011) where the rank
    is less than a quarter of the matrix's size: with 4 power iterations the two differ little even then.
    """
    if 4 * (rank + _OVERSAMPLING) < min(matrix.shape):
        with seeded(0, matrix.device):
            u, s, v = torch.svd_lowrank(matrix, rank + _OVERSAMPLING, niter=_ITERATIONS)
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return LowRank(root[:, None] * vh[:rank], u[:, :rank] * root, scale)


def weight_shapes(graph: fx.GraphModule) -> dict[fx.Node, list[int]]:
    """[out, in] of every linear's weight."""
    names = site_names(graph)
    read = cast("set[fx.Node]", {n.args[1] for n in names})
    shapes = infer_shapes(graph, only=constants(graph) | read)
    return {n: list(shapes[n.args[1]].shape) for n in names}  # type: ignore[index]


def without(
    graph: fx.GraphModule, weight: fx.Node, name: str, branch: LowRank, dtype: torch.dtype
) -> fx.Node:
    """W - s·B A as an expression on a weight, for what a branch is to hold that the weight held.

    A [rank, in] and B [out, rank] become parameters `{name}.taken_A` and `{name}.taken_B`; the difference is
    computed in their type and cast to `dtype`.
    """
    a, b = (
        add_parameter(graph, f"{name}.taken_{half}", t.clone())
        for half, t in (("A", branch.a), ("B", branch.b))
    )
    product = insert_after(graph, max(weight, a, b), aten.matmul.default, b, a)
    scaled = insert_after(graph, product, aten.mul.Tensor, product, branch.scale)
    rest = insert_after(graph, scaled, aten.sub.Tensor, weight, scaled)
    return rest if branch.a.dtype == dtype else insert_after(graph, rest, aten.to.dtype, rest, dtype)
