"""A model is captured where it is: its graph has the same nodes and tensors as on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import tiny
from simulated import DEVICE
from transformers import PreTrainedModel

from rolora_passes.graphs import load_graph, run, save_graph, to_device
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.devices import written_for
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.text import graph_text
from rolora_passes.graphs.verify import relative_error

TOKENS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def placed(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model on the device, its tied weights tied there too."""
    model = tiny(name, dtype).to(DEVICE)
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "mixtral", "bert", "bart"])
def test_a_graph_is_where_its_model_is(name: str, tmp_path: Path) -> None:
    expected, found = capture(tiny(name, torch.float32)), capture(placed(name))
    assert {value.device for value in parameters(found).values()} == {DEVICE}
    assert run(found, TOKENS).device == DEVICE
    back = to_device(found, "cpu")
    assert graph_text(back) == graph_text(expected)
    assert relative_error(run(back, TOKENS), run(expected, TOKENS)) < 1e-5
    for node in back.graph.nodes:  # as it is on a GPU, whose tensors files take
        node.kwargs = written_for(node.kwargs, DEVICE)
    save_graph(back, tmp_path / "graph.safetensors")
    assert graph_text(load_graph(tmp_path / "graph.safetensors")) == graph_text(expected)


def test_a_half_is_compared_in_float32_there() -> None:
    capture(placed("llama", torch.bfloat16))


def test_a_tied_table_is_moved_once() -> None:
    graph = to_device(capture(tiny("gemma2", torch.float32)), DEVICE)
    assert len({id(value) for value in parameters(graph).values()}) == len(parameters(graph))
    assert all(
        isinstance(v, torch.nn.Parameter) for k, v in parameters(graph).items() if k.endswith("weight")
    )
