"""MergeLoRA folds branches into weights, in whatever basis they are."""

from __future__ import annotations

import pytest
from helpers import captured, check_exact, check_idempotent, count, randomized

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    MergeLoRA,
    Pass,
    Rotate,
    apply_passes,
)
from rolora_passes.graphs.graph import aten, finish, insert_after, is_op

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


def test_nothing_to_merge() -> None:
    check_idempotent(captured("llama"), MergeLoRA())
