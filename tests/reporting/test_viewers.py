"""What viewers are given is whole: every edge has its ends, every figure its node."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from helpers import captured
from torch import fx

from rolora_passes import apply_passes
from rolora_passes.reporting.drawing import Drawing
from rolora_passes.reporting.model_explorer import write_model_explorer
from rolora_passes.reporting.netron import write_netron

STEPS = [
    "fuse-norm",
    "rotate",
    "insert-hadamard",
    {"quantize-weights": {"group_size": 8}},
    "quantize-activations",
]


def graph_of(name: str, quantized: bool) -> fx.GraphModule:
    graph = captured(name, torch.float32)
    return apply_passes(graph, STEPS if quantized else [], verify=False)


@pytest.mark.parametrize(
    ("name", "quantized"), [("llama", True), ("llama", False), ("mixtral", False), ("opt", False)]
)
def test_model_explorer(name: str, quantized: bool, tmp_path: Path) -> None:
    graph = graph_of(name, quantized)
    sqnr = {"linear": 31.5, "linear_1": 12.0, "not there": 1.0}
    first, *others = write_model_explorer(graph, tmp_path / "a.json", sqnr)
    assert [p.name for p in (first, *others)] == ["a.json", "a.bits.json", "a.basis.json", "a.sqnr.json"]
    collection = json.loads(first.read_text())
    (found,) = collection["graphs"]
    nodes = {node["id"]: node for node in found["nodes"]}
    assert len(nodes) == len(found["nodes"]) and (collection["label"], found["id"]) == ("a", "graph")
    for node in nodes.values():
        assert all(edge["sourceNodeId"] in nodes for edge in node["incomingEdges"])
        assert node["label"] in ("tokens", "positions") or node["incomingEdges"] or not node["namespace"]
        assert all(isinstance(a["value"], str) for a in node["attrs"])
    assert nodes["output"]["incomingEdges"]
    data = {path.name.split(".")[1]: json.loads(path.read_text())["graph"] for path in others}
    assert all(entry["results"].keys() <= nodes.keys() for entry in data.values())
    assert {n: e["value"] for n, e in data["sqnr"]["results"].items()} == {"linear": 31.5, "linear_1": 12.0}
    assert [stop["stop"] for stop in data["sqnr"]["gradient"]] == [0, 0.5, 1]


def test_namespaces_and_figures(tmp_path: Path) -> None:
    first, bits, basis = write_model_explorer(graph_of("llama", True), tmp_path / "a.json")
    nodes = {node["id"]: node for node in json.loads(first.read_text())["graphs"][0]["nodes"]}
    (down,) = (n for n in nodes.values() if n["namespace"] == "model/layers/1/mlp/down_proj")
    assert down["label"] == "linear"
    attributes = {a["key"]: a["value"] for a in down["attrs"]}
    assert attributes["summary"] == "[24, 40] 4 bits in groups of 8 = hadamard(rotate(W, R1), 40)"
    shape = {"key": "shape", "value": "float32[batch, sequence, 24]"}
    assert down["outputsMetadata"] == [{"id": "0", "attrs": [shape]}]
    source = nodes[down["incomingEdges"][0]["sourceNodeId"]]
    assert (source["label"], source["namespace"]) == ("fake_quantize", "model/layers/1/mlp")
    widths = {n: entry["value"] for n, entry in json.loads(bits.read_text())["graph"]["results"].items()}
    assert widths[down["id"]] == 4 and sorted(set(widths.values())) == [4, 32]
    assert json.loads(basis.read_text())["graph"]["results"][down["id"]]["value"].startswith("residual")


def test_bases_of_a_graph_that_may_rotate() -> None:
    graph = apply_passes(captured("llama"), ["fuse-norm"])
    found = Drawing(graph).overlays()["basis"]
    assert found["embedding"] == found["add_3"] == "residual"
    assert found["linear_4"] == "inner, rigid" and found["linear_2"] == "head"


@pytest.mark.parametrize(
    ("name", "quantized"), [("llama", True), ("llama", False), ("mixtral", False), ("opt", False)]
)
def test_netron(name: str, quantized: bool, tmp_path: Path) -> None:
    graph = graph_of(name, quantized)
    model = onnx.load(write_netron(graph, tmp_path / "a.onnx", {"linear": 31.5}), load_external_data=False)
    made = model.graph
    known = [v.name for v in made.input] + [t.name for t in made.initializer]
    for node in made.node:  # in order, each value once
        assert set(node.input) <= set(known)
        known += node.output
    assert len(known) == len(set(known)) and made.output[0].name in known
    assert [v.name for v in made.input] == ["tokens", "positions"]
    assert {d.domain for d in model.opset_import} >= {node.domain for node in made.node}
    assert all(t.data_location == onnx.TensorProto.EXTERNAL and not t.raw_data for t in made.initializer)
    (linear,) = (n for n in made.node if list(n.output) == ["linear"])
    words = {p.key: p.value for p in linear.metadata_props}
    assert words["sqnr"] == "31.5" and words["bits"] == ("4.0" if quantized else "32.0")
    assert words["module"].endswith("q_proj") or name == "opt"
    assert (tmp_path / "a.onnx").stat().st_size < 200_000


def test_netron_tables_of_positions_and_literals(tmp_path: Path) -> None:
    """Every layer reads them as if stored; a width in bits is a type of ONNX's."""
    made = onnx.load(
        write_netron(graph_of("llama", True), tmp_path / "a.onnx"), load_external_data=False
    ).graph
    turned = [n for n in made.node if n.op_type == "rotary_embedding"]
    assert len(turned) == 4
    assert all(name.endswith(" of positions") for n in turned for name in n.input[1:])
    kinds = {t.name: t.data_type for t in made.initializer}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == onnx.TensorProto.INT4
    assert kinds["model.embed_tokens.weight"] == onnx.TensorProto.FLOAT
    (attention, _) = (n for n in made.node if n.op_type == "attention")
    scale = {a.name: onnx.helper.get_attribute_value(a) for a in attention.attribute}["scale"]
    assert scale == pytest.approx(8**-0.5)
