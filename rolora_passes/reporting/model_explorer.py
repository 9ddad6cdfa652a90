"""Graphs for Model Explorer: graph JSON with modules as folders, and node data in files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import fx

from rolora_passes.files import writing
from rolora_passes.graphs.graph import op_name
from rolora_passes.inspection.diff import literals
from rolora_passes.reporting.drawing import Drawing, Overlay

GRAPH = "graph"  # the id that node data refers to
# Gradients for numbers, from lowest to highest; colours for words.
_GRADIENTS = {"bits": ("#deebf7", "#6baed6", "#2171b5"), "sqnr": ("#d73027", "#fee08b", "#1a9850")}
_COLOURS = ("#a6cee3", "#b2df8a", "#fdbf6f", "#cab2d6", "#fb9a99", "#ffff99", "#d9d9d9", "#ccebc5")


def write_model_explorer(
    graph: fx.GraphModule, path: str | Path, sqnr: Mapping[str, float] | None = None
) -> list[Path]:
    """Write a graph, and a node data file for each overlay (`model.bits.json` beside `model.json`).

    Open them with `model-explorer model.json --node_data_paths=model.bits.json,model.basis.json`.

    Args:
        sqnr: SQNR in dB by node name, as `track_errors` measures it; None leaves that overlay out.

    Returns: the files, the graph first.
    """
    path, drawing = Path(path), Drawing(graph)
    files = {path: graph_collection(drawing, path.stem)}
    for name, values in drawing.overlays(sqnr).items():
        files[path.with_suffix(f".{name}.json")] = node_data(name, values)
    for place, content in files.items():
        with writing(place) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    return list(files)


def graph_collection(drawing: Drawing, label: str) -> dict[str, Any]:
    """A GraphCollection with one graph."""
    return {"label": label, "graphs": [{"id": GRAPH, "nodes": [_node(drawing, n) for n in drawing.nodes]}]}


def _node(drawing: Drawing, node: fx.Node) -> dict[str, Any]:
    return {
        "id": node.name,
        "label": node.name if node.op == "placeholder" else op_name(node),
        "namespace": drawing.module(node).replace(".", "/"),
        "attrs": [{"key": key, "value": value} for key, value in _attributes(drawing, node).items()],
        "incomingEdges": [
            {"sourceNodeId": source.name, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
            for place, source in enumerate(drawing.inputs(node))
        ],
        "outputsMetadata": _outputs(drawing, node),
    }


def _attributes(drawing: Drawing, node: fx.Node) -> dict[str, str]:
    if node.op != "call_function":
        return {}
    known = {name: str(value) for name, value in literals(node).items() if value is not None}
    return {"summary": drawing.words.phrase(node), **known}


def _outputs(drawing: Drawing, node: fx.Node) -> list[dict[str, Any]]:
    sizes = drawing.sizes(node)
    if sizes is None:
        return []
    dtype, shape = sizes
    value = f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"
    return [{"id": "0", "attrs": [{"key": "shape", "value": value}]}]


def node_data(name: str, values: Overlay) -> dict[str, Any]:
    """Node data: numbers on a colour gradient, words in one colour each."""
    if name in _GRADIENTS:
        results = {node: {"value": value} for node, value in values.items()}
        stops = zip((0, 0.5, 1), _GRADIENTS[name], strict=True)
        gradient = [{"stop": stop, "bgColor": colour} for stop, colour in stops]
        return {GRAPH: {"name": name, "results": results, "gradient": gradient}}
    colours = dict(zip(sorted(map(str, set(values.values()))), cycle(_COLOURS)))
    results = {node: {"value": value, "bgColor": colours[str(value)]} for node, value in values.items()}
    return {GRAPH: {"name": name, "results": results}}
