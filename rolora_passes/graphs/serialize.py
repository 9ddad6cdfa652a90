"""Save a graph as one safetensors file, and load it where transformers is not installed.

The nodes are JSON in the file's metadata: operators by name, arguments by value. Nothing is pickled, and a
file can name nothing but what `graphs.allowed` lets it, so loading runs no code of the file's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import fx

from rolora_passes.errors import GraphFormatError, one_line
from rolora_passes.files import writing
from rolora_passes.graphs.allowed import (
    find_operator,
    named_type,
    operator_name,
    require_arguments,
    require_identifier,
    require_tensor_names,
)
from rolora_passes.graphs.axis_maps import Way
from rolora_passes.graphs.graph import parameters, set_tensor
from rolora_passes.graphs.info import GraphInfo, Record, Rotation, info, set_info
from rolora_passes.graphs.lineage import plain as plain_step
from rolora_passes.graphs.lineage import step_of
from rolora_passes.tensor_files import form, write_tensors

FORMAT = "rolora-graph-2"
# What a file says of a graph (`graphs.info`), and what each part is in JSON; a file may leave parts out.
_ABOUT: dict[str, type] = {
    "config": dict, "weights": dict, "tied": dict, "replaced": list, "rotations": dict, "ways": dict,
    "cached": list, "history": list,
}  # fmt: skip
_TYPES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def save_graph(graph: fx.GraphModule, path: str | Path) -> Path:
    """Write a graph, its tensors (shared ones once) and what it remembers to one file.

    Raises:
        GraphFormatError: the graph calls something that no file may name, or has a parameter of such a name.
    """
    path = Path(path)
    require_tensor_names(parameters(graph))
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    by_storage: dict[tuple[Any, ...], str] = {}
    for name, value in {**parameters(graph), **_held(info(graph))}.items():
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        first = by_storage.setdefault(key, name)
        if first == name:
            tensors[name] = value
        else:
            aliases[name] = first
    nodes, about = [_node(n) for n in graph.graph.nodes], _about(info(graph))
    described = {"format": FORMAT, "nodes": nodes, "aliases": aliases, "meta": about}
    with writing(path) as temporary:
        forms = {name: form(value) for name, value in tensors.items()}
        write_tensors(temporary, forms, tensors.__getitem__, {"graph": json.dumps(described)})
    return path


def load_graph(path: str | Path) -> fx.GraphModule:
    """Read a graph that `save_graph` wrote.

    Raises:
        GraphFormatError: no such file, damaged, or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise GraphFormatError(f"expected a saved graph at {path}, found nothing")
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("graph", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise GraphFormatError(
            f"{path} is damaged or not a safetensors file: {error}; save it again"
        ) from error
    found = described.get("format") if isinstance(described, dict) else "no graph"
    if found != FORMAT:
        raise GraphFormatError(f"expected a graph of format {FORMAT} in {path}, found {found}")
    try:
        return _built(described, tensors)
    except GraphFormatError as error:
        raise GraphFormatError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise GraphFormatError(f"{path} is not as save_graph wrote it: {one_line(error)}") from error


def _built(described: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> fx.GraphModule:
    """The graph that a file describes."""
    tensors |= {name: tensors[first] for name, first in described["aliases"].items()}
    read = [entry["target"] for entry in described["nodes"] if entry["op"] == "get_attr"]
    require_tensor_names(read)
    graph, nodes = fx.GraphModule(torch.nn.Module(), fx.Graph()), dict[str, fx.Node]()
    for name in read:
        set_tensor(graph, name, tensors[name])
    for entry in described["nodes"]:
        node = _add_node(graph, entry, nodes)
        nodes[entry["name"]] = node
        if entry.get("source"):
            node.meta["source"] = str(entry["source"])
    if [n.op for n in graph.graph.nodes].count("output") != 1 or node.op != "output":
        raise GraphFormatError("expected one output, and nothing after it")
    set_info(graph, _info(described["meta"], tensors))
    graph.recompile()
    return graph


def _held(known: GraphInfo) -> dict[str, torch.Tensor]:
    """The tensors of a graph's record, by the names that a file has for them."""
    steps = {name: value for way in known.ways.values() for name, value in way.tensors.items()}
    return {
        **{f"rotation_tensors/{key}": rotation.matrix for key, rotation in known.rotations.items()},
        **{f"way_tensors/{name}": steps[name] for name in sorted(steps)},
    }


def _about(known: GraphInfo) -> dict[str, Any]:
    """A graph's record as JSON has it, its tensors apart."""
    plain = {field.name: getattr(known, field.name) for field in fields(known)}
    plain["rotations"] = {key: rotation.entry() for key, rotation in known.rotations.items()}
    plain["ways"] = {
        name: {"root": way.root, "steps": [plain_step(step) for step in way.steps], "reason": way.reason}
        for name, way in known.ways.items()
    }
    plain["history"] = [record.to_json() for record in known.history]
    return {part: value for part, value in plain.items() if value}


def _info(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> GraphInfo:
    """The record of which `_about` and `_held` wrote the parts."""
    for part, kind in _ABOUT.items():
        if not isinstance(about.get(part, kind()), kind):
            raise GraphFormatError(f"expected {part} to be a {kind.__name__}")
    rotations = {
        key: Rotation.of(entry, tensors[f"rotation_tensors/{key}"])
        for key, entry in about.get("rotations", {}).items()
    }
    cached = about.get("cached")
    return GraphInfo(
        **{part: about[part] for part in ("config", "weights", "tied") if part in about},
        replaced=tuple(about.get("replaced", ())),
        rotations=rotations,
        ways={name: _way(known, tensors) for name, known in about.get("ways", {}).items()},
        cached=None if cached is None else (int(cached[0]), int(cached[1])),
        history=tuple(Record.from_json(known) for known in about.get("history", ())),
    )


def _way(known: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Way:
    steps = tuple(step_of(step) for step in known["steps"])
    own = {name: tensors[f"way_tensors/{name}"] for step in steps for name in step.tensors}
    return Way(known["root"], steps, own, known["reason"])


def _add_node(graph: fx.GraphModule, entry: Mapping[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    """One node of a file, of which everything it names is checked first."""
    op, target, name = entry["op"], entry["target"], require_identifier(entry["name"], nodes, "a node")
    args = tuple(_decode(a, nodes) for a in entry["args"])
    kwargs = {k: _decode(v, nodes) for k, v in entry["kwargs"].items()}
    if op == "call_function":
        target = find_operator(target)
        require_arguments(target, args, kwargs, name)
    elif op == "placeholder":
        inputs = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
        require_identifier(target, inputs, "an input")
    elif op == "output":
        target = "output"
    elif op != "get_attr":
        raise GraphFormatError(
            f"expected a node to be an input, a parameter, a call or the output, found {op!r}"
        )
    if (kwargs and op != "call_function") or (op in ("placeholder", "get_attr") and args):
        raise GraphFormatError(f"{name}: expected no arguments of {op}, found {args}, {kwargs}")
    return graph.graph.create_node(op, target, args, kwargs, name=name)


def _node(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function":
        try:
            target = operator_name(target)
        except GraphFormatError as error:
            raise GraphFormatError(f"cannot save {node.format_node()}: {error}") from error
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_encode(a) for a in node.args],
        "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
        "source": node.meta.get("source"),
    }


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, _TYPES):
        return (
            {"torch": str(value).removeprefix("torch.")}
            if not isinstance(value, torch.device)
            else {"device": str(value)}
        )
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    raise GraphFormatError(f"cannot save an argument of type {type(value).__name__}: {value!r}")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "torch":
        return named_type(content)
    if kind == "node" and content not in nodes:
        raise GraphFormatError(f"a node reads {content!r}, which does not come before it")
    if kind == "device":
        return torch.device("cpu")  # wherever it was saved: tensors are read to there
    decoders: dict[str, Any] = {"node": nodes.get, "float": float.fromhex}
    return decoders[kind](content)
