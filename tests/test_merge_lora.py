"""MergeLoRA folds branches into weights, in whatever basis they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import captured, check_exact, check_idempotent, count, randomized

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    MergeLoRA,
    Pass,
    QuantizeWeights,
    Rotate,
    apply_passes,
    history,
)
from rolora_passes.graphs.graph import aten, finish, insert_after, is_op, site_names

BETWEEN: dict[str, list[Pass]] = {
    "nothing": [],
    "fuse-norm": [FuseNorm()],
    "rotate": [FuseNorm(), Rotate()],
    "insert-hadamard": [InsertHadamard()],
    "everything, folded": [FuseNorm(), Rotate(), InsertHadamard(), FoldConstants()],
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "gemma2", "gpt_neox"])
def test_keeps_the_function(name: str) -> None:
    graph = randomized(apply_passes(captured(name), [AddLoRA(rank=2)]), "lora_")
    merged = check_exact(graph, [MergeLoRA(), FoldConstants()])
    assert count(merged, "linear") == count(captured(name), "linear")


@pytest.mark.parametrize(
    ("name", "between"),
    [
        *(("llama", between) for between in BETWEEN),
        ("gpt2", "everything, folded"),
        ("phi3", "everything, folded"),
    ],
)
def test_after_other_passes(name: str, between: str) -> None:
    graph = randomized(apply_passes(captured(name), [AddLoRA(rank=2)]), "lora_")
    merged = check_exact(graph, [*BETWEEN[between], MergeLoRA(), FoldConstants()])
    assert count(merged, "linear") == count(captured(name), "linear")
    check_idempotent(merged, MergeLoRA())


def test_two_adapters_on_one_weight() -> None:
    twice = apply_passes(captured("llama"), [AddLoRA("q_proj", rank=2), AddLoRA("q_proj", rank=3, seed=1)])
    graph = randomized(twice, "lora_")
    merged = check_exact(graph, [MergeLoRA(), FoldConstants()])
    assert count(merged, "linear") == count(captured("llama"), "linear")


def test_a_linear_that_something_else_reads_is_left() -> None:
    graph = randomized(apply_passes(captured("llama"), [AddLoRA("o_proj", rank=2)]), "lora_")
    base = next(
        n for n in graph.graph.nodes if is_op(n, "linear") and "o_proj.weight" in str(n.args[1].target)
    )
    total = next(u for u in base.users if is_op(u, "add"))
    after = insert_after(graph, total, aten.add.Tensor, total, base)
    total.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    check_exact(finish(graph), [MergeLoRA()])


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("method", ["rtn", "nf"])
def test_branches_on_a_grid_leave_weights_that_passes_see(folded: bool, method: Any) -> None:
    """Sums of a weight and what is dequantized as the graph runs would be no sites any more."""
    base = captured("opt", torch.float32)
    graph = randomized(apply_passes(base, [AddLoRA(rank=4), FuseNorm()], verify=False), "lora_")
    stored = QuantizeWeights(8, None, method=method, targets=("lora_A", "lora_B"), head=None)
    graph = apply_passes(graph, [stored, *([FoldConstants()] if folded else [])])
    merged = check_exact(graph, [MergeLoRA()], tolerance=1e-5)
    assert not count(merged, "dequantize", "decode")
    sites = {n for n in site_names(base).values() if n != "lm_head"}
    assert set(history(merged)[-1].report.changed) == sites
    last = history(apply_passes(merged, [QuantizeWeights(group_size=8, head=None)]))[-1].report
    assert {entry.partition(":")[0] for entry in last.changed} == sites


def test_nothing_to_merge() -> None:
    check_idempotent(captured("llama"), MergeLoRA())
