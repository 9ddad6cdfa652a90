"""A saved graph is the same graph, also where transformers is not installed."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, chosen
from helpers import captured, difference, matrices, tokens_for
from safetensors import safe_open
from safetensors.torch import save_file
from torch import fx

from rolora_passes import (
    FoldConstants,
    FuseNorm,
    QuantizeActivations,
    QuantizeWeights,
    Rotate,
    apply_passes,
    files,
)
from rolora_passes.errors import GraphFormatError
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.facts import facts
from rolora_passes.graphs.graph import copy_graph, insert_after, parameters
from rolora_passes.graphs.info import GraphInfo, info, set_info
from rolora_passes.graphs.running import run
from rolora_passes.graphs.serialize import load_graph, save_graph
from rolora_passes.graphs.text import graph_text
from rolora_passes.graphs.verify import relative_error


def same(found: fx.GraphModule, expected: fx.GraphModule) -> None:
    assert graph_text(found) == graph_text(expected)
    assert [n.meta for n in found.graph.nodes] == [n.meta for n in expected.graph.nodes]  # sources
    old, new = parameters(expected), parameters(found)
    assert all(torch.equal(new[name], old[name]) and new[name].dtype == old[name].dtype for name in old)
    tokens = tokens_for(expected)  # memory is aligned differently: kernels may sum in another order
    allowed = 1e-5 if dtype_of(expected) == torch.float32 else 1e-13
    assert relative_error(run(found, tokens), run(expected, tokens)) < allowed


@pytest.mark.parametrize("name", [*chosen(CONFIGS), "bert", "bart", "deberta"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    graph = captured(name)
    loaded = load_graph(save_graph(graph, tmp_path / "graph.safetensors"))
    same(loaded, graph)
    assert info(loaded).config == info(graph).config and facts(loaded) == facts(graph)


def test_round_trip_of_a_quantized_graph(tmp_path: Path) -> None:
    single = captured("llama", torch.float32)
    graph = apply_passes(single, [QuantizeWeights(group_size=None), QuantizeActivations(), FoldConstants()])
    same(load_graph(save_graph(graph, tmp_path / "graph.safetensors")), graph)


def test_expressions_and_rotations_survive(tmp_path: Path) -> None:
    graph = apply_passes(captured("llama"), [FuseNorm(), Rotate(residual="orthogonal")])
    loaded = load_graph(save_graph(graph, tmp_path / "graph.safetensors"))
    same(loaded, graph)
    assert info(loaded).rotations == info(graph).rotations
    for key, value in matrices(graph).items():
        assert torch.equal(matrices(loaded)[key], value)
    assert difference(apply_passes(loaded, [FoldConstants()]), graph) < 1e-10


def rewritten(path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A saved graph whose description was edited."""
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["graph"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(described)
    save_file(tensors, path, metadata={"graph": json.dumps(described)})
    return path


def test_all_that_a_graph_carries_is_saved(tmp_path: Path) -> None:
    """Every field of the record; a new one that is not saved fails here."""
    passes = ["fuse-norm", "rotate", "fold-constants", {"add-lora": {"rank": 2}}]
    graph = apply_passes(captured("llama-tied"), passes)
    set_info(graph, replaced=("lm_head.weight",), cached=(64, 32))
    known = info(graph)
    found = info(load_graph(save_graph(graph, tmp_path / "graph.safetensors")))
    for field in dataclasses.fields(GraphInfo):
        assert getattr(known, field.name), field.name
        if field.name != "ways":
            assert getattr(found, field.name) == getattr(known, field.name)
    assert found.ways.keys() == known.ways.keys()
    for name, way in known.ways.items():
        assert found.ways[name].steps == way.steps and found.ways[name].root == way.root
        assert all(torch.equal(found.ways[name].tensors[key], value) for key, value in way.tensors.items())
    assert [record.name for record in found.history] == [
        "fuse-norm", "rotate", "fold-constants", "add-lora",
    ]  # fmt: skip
    assert found.history[1].report.moved and str(found.history[1]) == str(known.history[1])


def test_a_file_of_the_version_before_loads(tmp_path: Path) -> None:
    """It has no history, and nothing of caches."""
    graph = apply_passes(captured("llama"), ["fuse-norm", "rotate", "fold-constants"])

    def older(described: dict[str, Any]) -> None:
        del described["meta"]["history"]

    loaded = load_graph(rewritten(save_graph(graph, tmp_path / "graph.safetensors"), older))
    same(loaded, graph)
    assert info(loaded).history == () and info(loaded).cached is None
    assert info(loaded).rotations == info(graph).rotations


@pytest.mark.parametrize("part", ["rotations", "history", "cached"])
def test_a_damaged_record_is_refused(part: str, tmp_path: Path) -> None:
    graph = apply_passes(captured("llama"), ["fuse-norm", "rotate"])
    path = rewritten(
        save_graph(graph, tmp_path / "graph.safetensors"), lambda d: d["meta"].update({part: "?"})
    )
    with pytest.raises(GraphFormatError, match=f"expected {part} to be a"):
        load_graph(path)


def test_nothing_else_is_kept_in_a_graphs_meta() -> None:
    """Keys of `meta` in the package are those of nodes: a graph's own would not be saved."""
    key = r"""\.meta(?:\.\w+\(|\[| \|= ?\{)["'](\w+)|["'](\w+)["'] (?:not )?in \w+\.meta\b"""
    package = Path(files.__file__).parent
    found = {a or b for path in package.rglob("*.py") for a, b in re.findall(key, path.read_text("utf-8"))}
    assert found == {"val", "source", "stack_trace"}


def test_a_file_without_sources_loads(tmp_path: Path) -> None:
    graph = copy_graph(captured("llama"))
    for node in graph.graph.nodes:
        node.meta.clear()

    def without(described: dict[str, Any]) -> None:
        for entry in described["nodes"]:
            del entry["source"]

    same(load_graph(rewritten(save_graph(graph, tmp_path / "graph.safetensors"), without)), graph)


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    graph = apply_passes(captured("llama-tied"), [FuseNorm()])  # two names, one table
    path = save_graph(graph, tmp_path / "graph.safetensors")
    names = [name for name, value in parameters(graph).items() if tuple(value.shape) == (97, 24)]
    assert len(names) == 2
    size = sum(
        v.numel() * v.element_size() for v in {v.data_ptr(): v for v in parameters(graph).values()}.values()
    )
    assert path.stat().st_size < size + 97 * 24 * 8 // 2 + len(json.dumps(graph_text(graph))) * 12


def test_loads_without_transformers(tmp_path: Path) -> None:
    graph = captured("gemma2")
    path = save_graph(graph, tmp_path / "graph.safetensors")
    tokens = tokens_for(graph)
    torch.save((tokens, run(graph, tokens)), tmp_path / "expected.pt")
    code = f"""
import sys, torch
from rolora_passes.graphs.serialize import load_graph
from rolora_passes.graphs.running import run
torch.set_num_threads(1)
tokens, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(run(load_graph({str(path)!r}), tokens), expected, rtol=1e-12, atol=1e-12)
assert not [m for m in sys.modules if m.split(".")[0] == "transformers"], "transformers was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(GraphFormatError, match="expected a saved graph at"):
        load_graph(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_a_file_cut_short(keep: float, tmp_path: Path) -> None:
    path = save_graph(captured("llama"), tmp_path / "graph.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(GraphFormatError, match=r"graph\.safetensors is damaged"):
        load_graph(path)


def test_safetensors_that_are_not_a_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(GraphFormatError, match="found no graph"):
        load_graph(path)
    save_file({"x": torch.ones(2)}, path, metadata={"graph": json.dumps({"format": "rolora-graph-0"})})
    with pytest.raises(GraphFormatError, match="found rolora-graph-0"):
        load_graph(path)
    save_file({"x": torch.ones(2)}, path, metadata={"graph": "{"})
    with pytest.raises(GraphFormatError, match="damaged"):
        load_graph(path)


def test_an_operator_this_torch_lacks(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    node = {
        "op": "call_function",
        "name": "a",
        "target": "aten.of_the_future.default",
        "args": [],
        "kwargs": {},
    }
    described = {"format": "rolora-graph-2", "nodes": [node], "aliases": {}, "meta": {}}
    save_file({"x": torch.ones(2)}, path, metadata={"graph": json.dumps(described)})
    with pytest.raises(GraphFormatError, match=r"aten\.of_the_future"):
        load_graph(path)


def test_what_cannot_be_named_cannot_be_saved(tmp_path: Path) -> None:
    graph = copy_graph(captured("llama"))
    last = next(n for n in reversed(graph.graph.nodes) if n.op == "call_function")
    insert_after(graph, last, lambda x: x, last)
    with pytest.raises(GraphFormatError, match="is not a registered operator"):
        save_graph(graph, tmp_path / "graph.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["write_tensors", "replace"])
def test_an_interrupted_write_leaves_what_was_there(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "graph.safetensors"
    path.write_bytes(b"what was there")

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    if where == "replace":
        monkeypatch.setattr(files.os, "replace", fail)
    else:
        monkeypatch.setattr(sys.modules["rolora_passes.graphs.serialize"], "write_tensors", fail)
    with pytest.raises(KeyboardInterrupt):
        save_graph(captured("llama"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["graph.safetensors"]
    assert path.read_bytes() == b"what was there"
