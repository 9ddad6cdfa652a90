"""What differs between two graphs is said once, and nothing is said where nothing does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from goldens import check_golden
from helpers import captured
from torch import fx

from rolora_passes import apply_passes
from rolora_passes.graphs import load_graph, save_graph
from rolora_passes.graphs.graph import copy_graph, finish, is_op, parameters, set_tensor, site_names
from rolora_passes.inspection.diff import diff_text
from rolora_passes.passes.manager import PassLike

STEPS: dict[str, PassLike] = {
    "fuse-norm": "fuse-norm",
    "rotate": "rotate",
    "insert-hadamard": "insert-hadamard",
    "quantize-weights": {"quantize-weights": {"group_size": 8}},
    "quantize-activations": "quantize-activations",
    "quantize-kv-cache": "quantize-kv-cache",
    "fold-constants": "fold-constants",
}


@pytest.fixture(scope="module")
def stages() -> list[fx.GraphModule]:
    """The tiny llama, then the graph after each of the steps."""
    found = [captured("llama", torch.float32)]
    for step in STEPS.values():
        found.append(apply_passes(found[-1], [step], verify=False))
    return found


@pytest.mark.parametrize("name", STEPS)
def test_passes(name: str, stages: list[fx.GraphModule]) -> None:
    place = list(STEPS).index(name)
    check_golden(f"diff-{name}", diff_text(stages[place], stages[place + 1]))


def test_from_the_first_to_the_last(stages: list[fx.GraphModule]) -> None:
    check_golden("diff-all", diff_text(stages[0], stages[-1]))


def test_no_difference(stages: list[fx.GraphModule], tmp_path: Path) -> None:
    for graph in (stages[0], stages[-1]):
        loaded = load_graph(save_graph(graph, tmp_path / "graph.safetensors"))
        for other in (graph, copy_graph(graph), loaded):
            assert diff_text(graph, other) == "no difference\n"


def test_a_changed_weight() -> None:
    graph = captured("llama")
    other, name = copy_graph(graph), "model.layers.1.mlp.up_proj.weight"
    set_tensor(other, name, parameters(graph)[name] * 1.25)
    assert diff_text(graph, other) == f"weights:\n  0.250           {name.replace('1', '*')}\n"


def test_a_changed_argument_and_another_operand() -> None:
    graph = captured("llama")
    other = copy_graph(graph)
    norms = [n for n in other.graph.nodes if is_op(n, "rms_norm")]
    norms[2].args = (*norms[2].args[:3], 1e-3)
    (gate,) = (n for n, name in site_names(other).items() if name == "model.layers.0.mlp.gate_proj")
    read = gate.args[0]
    gate.update_arg(0, norms[1])  # without the norm's gain
    assert diff_text(graph, finish(other)) == (
        "nodes:\n"
        f"  ~ model.layers.*.mlp.gate_proj: reads {norms[1].name}, not {read}\n"
        "  ~ rms_norm in model.layers.*: eps 1e-06 -> 0.001\n"
    )


def test_another_size() -> None:
    graph = captured("llama")
    other, name = copy_graph(graph), "model.layers.0.mlp.up_proj.weight"
    set_tensor(other, name, parameters(graph)[name][:20])
    assert "another shape   model.layers.*.mlp.up_proj.weight" in diff_text(graph, other)
