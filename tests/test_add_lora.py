"""AddLoRA: before or after a rotation is the order of two passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, SOME, UNTIED, chosen
from helpers import captured, check, check_exact, count, difference, randomized
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    LoftQ,
    MergeLoRA,
    Pass,
    Rotate,
    apply_passes,
    history,
)
from rolora_passes.adapters.lora import find_branches
from rolora_passes.errors import PassError
from rolora_passes.graphs import capture, load_graph, run, save_graph
from rolora_passes.graphs.capture import from_exported
from rolora_passes.graphs.graph import linears, parameters
from rolora_passes.graphs.verify import relative_error


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "gemma2", "gpt_neox"])
def test_zero_branches_keep_the_function(name: str) -> None:
    graph = check_exact(captured(name), [AddLoRA(rank=2)], tolerance=0.0)
    left = 1 + len(history(graph)[-1].report.left)  # the head, and routers
    assert count(graph, "linear") == 3 * count(captured(name), "linear") - 2 * left
    assert left == (3 if name == "mixtral" else 1)


@pytest.mark.parametrize("name", SOME)
def test_trained_branches_are_fused_and_rotated_with_the_weights(name: str) -> None:
    graph = randomized(apply_passes(captured(name), [AddLoRA(rank=2)]), "lora_")
    assert difference(graph, captured(name)) > 1e-3
    rotate = Rotate(residual="orthogonal", heads="orthogonal", others="orthogonal")
    check_exact(graph, [FuseNorm(), rotate, InsertHadamard(), FoldConstants()])


def test_before_or_after_rotation() -> None:
    first = check_exact(captured("llama"), [AddLoRA(rank=2), FuseNorm(), Rotate()])
    last = check_exact(captured("llama"), [FuseNorm(), Rotate(), AddLoRA(rank=2)])
    assert difference(first, last) < 1e-10
    assert len(linears(first)) == len(linears(last))


def test_gaussian_branches_change_the_function_and_say_so() -> None:
    graph = check(captured("llama"), [AddLoRA(rank=2, init="gaussian")])
    assert difference(graph, captured("llama")) > 1e-3
    assert history(graph)[-1].kind == "trained" and history(graph)[-1].error is None


def test_the_scale_is_alpha_over_rank() -> None:
    one = apply_passes(captured("llama"), [AddLoRA(rank=2, alpha=3.0, init="gaussian")])
    assert {n.args[1] for n in one.graph.nodes if n.name.startswith("mul") and n.args[1] == 1.5} == {1.5}


def test_a_seed_draws_the_same_branches() -> None:
    a, b, c = (
        parameters(apply_passes(captured("llama"), [AddLoRA(rank=2, init="gaussian", seed=s)]))
        for s in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    assert a[name].shape == (2, 24)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 14), ("q_proj", 2), (("q_proj", "v_proj"), 4), ("re:.*layers\\.1\\.mlp.*", 3),
        ("model.layers.0.self_attn.o_proj", 1),
    ],
)  # fmt: skip
def test_targets(targets: str | tuple[str, ...], expected: int) -> None:
    graph = apply_passes(captured("llama"), [AddLoRA(targets=targets, rank=2)])
    assert len(history(graph)[-1].report.changed) == expected


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_queries_and_values_are_found_by_structure(name: str) -> None:
    graph = apply_passes(captured(name), [AddLoRA(targets=("queries", "values"), rank=2)])
    assert len(history(graph)[-1].report.changed) == 4  # of two layers


def test_a_split_projection_is_meant_by_its_whole_name() -> None:
    graph = check_exact(captured("phi3"), [AddLoRA(targets="qkv_proj", rank=2)])
    assert len(history(graph)[-1].report.changed) == 6


def test_targets_that_match_nothing() -> None:
    for targets in ("wq", ("head",), "lm_head"):
        with pytest.raises(PassError, match="no linear matches") as error:
            apply_passes(captured("llama"), [AddLoRA(targets=targets)])
        assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, and" in str(error.value)
        assert "and by what they make, queries, keys and values; lm_head, the head, takes none" in str(
            error.value
        )


def test_options_are_checked() -> None:
    with pytest.raises(PassError, match=r"rank 25 exceeds model\.layers\.0.* which is 32 x 24"):
        apply_passes(captured("llama"), [AddLoRA(rank=25, targets="q_proj")])
    with pytest.raises(PassError, match="positive rank"):
        AddLoRA(rank=0)
    with pytest.raises(PassError, match="init 'loft'"):
        AddLoRA(init="loft")  # type: ignore[arg-type]


class Unusual(torch.nn.Module):
    """Linears whose weights are not called so: a plain parameter, and one of a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 8)
        self.w = torch.nn.Parameter(torch.randn(8, 8))
        self.head = torch.nn.Linear(8, 11)
        torch.nn.utils.parametrizations.weight_norm(self.up)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + torch.tanh(self.up(x)) @ self.w
        found: torch.Tensor = self.head(x)
        return found


@pytest.mark.parametrize("init", ["gaussian", "svd"])
def test_branches_of_weights_that_are_parameters_of_another_name(init: Any, tmp_path: Path) -> None:
    example = torch.zeros(2, 3, dtype=torch.int64), torch.arange(3).expand(2, 3)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(Unusual().double(), example, dynamic_shapes=(dims, dims))
    graph = from_exported(program)
    found = apply_passes(graph, [AddLoRA(rank=2, init=init)])
    assert len(history(found)[-1].report.changed) == 2 == len(find_branches(found))
    assert "w_lora_A.weight" in parameters(found)
    tokens = torch.arange(10)[None]
    assert (relative_error(run(found, tokens), run(graph, tokens)) < 1e-10) == (init == "svd")
    folded = apply_passes(found, [FoldConstants()])
    save_graph(folded, tmp_path / "graph.safetensors")
    loaded = load_graph(tmp_path / "graph.safetensors")
    assert relative_error(run(loaded, tokens), run(found, tokens)) < 1e-10
    merged = apply_passes(found, [MergeLoRA(), FoldConstants()])
    assert relative_error(run(merged, tokens), run(found, tokens)) < 1e-10


@pytest.mark.parametrize("step", [AddLoRA(rank=4), LoftQ(bits=4, group_size=None, rank=4)])
def test_routers_and_gates_of_one_number_are_left_unless_they_are_named(step: Pass) -> None:
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "shared_expert_intermediate_size": 16}
    config = Qwen2MoeConfig(**UNTIED, **sizes)
    graph = capture(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    report = history(apply_passes(graph, [step]))[-1].report
    left = {name for name, reason in report.left if "name it in targets" in reason}
    gates = ("mlp.gate", "mlp.shared_expert_gate")
    assert left == {f"model.layers.{i}.{gate}" for i in range(2) for gate in gates}
    assert not any(site.endswith("gate") for site in report.changed)
    named = history(apply_passes(graph, [AddLoRA(rank=1, targets=("all-linear", "shared_expert_gate"))]))
    assert "model.layers.1.mlp.shared_expert_gate" in named[-1].report.changed
