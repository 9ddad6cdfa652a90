"""Save a graph as one safetensors file, and load it where transformers is not installed.

The nodes are JSON in the file's metadata: operators by name, arguments by value. Nothing is pickled, so
loading runs no code; only operators that torch has registered can be named.
"""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx

from rolora_passes.errors import GraphFormatError
from rolora_passes.graphs import ops as _ops  # noqa: F401  (registers the operators)
from rolora_passes.graphs import quantizers as _quantizers  # noqa: F401
from rolora_passes.graphs.files import writing
from rolora_passes.graphs.graph import TENSORS, parameters, set_tensor

FORMAT = "rolora-graph-2"
_PYTHON = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "neg")
}
_TYPES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def save_graph(graph: fx.GraphModule, path: str | Path) -> Path:
    """Write a graph, its tensors (shared ones once) and its facts to one file.

    Raises:
        GraphFormatError: the graph calls something that has no name to load it by.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    by_storage: dict[tuple[Any, ...], str] = {}
    named = {
        **parameters(graph),
        **{f"{kind}/{k}": v for kind in TENSORS for k, v in graph.meta.get(kind, {}).items()},
    }
    for name, value in named.items():
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        first = by_storage.setdefault(key, name)
        if first == name:
            tensors[name] = value.detach().contiguous().clone() if _shared(value) else value.detach()
        else:
            aliases[name] = first
    kept = ("config", "facts", "rotations", "ways", "weights", "tied", "replaced")
    facts = {k: v for k, v in graph.meta.items() if k in kept}
    described = {
        "format": FORMAT, "nodes": [_node(n) for n in graph.graph.nodes], "aliases": aliases, "meta": facts,
    }  # fmt: skip
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata={"graph": json.dumps(described)})
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
    except (SafetensorError, json.JSONDecodeError) as error:
        raise GraphFormatError(
            f"{path} is damaged or not a safetensors file: {error}; save it again"
        ) from error
    if not described or described.get("format") != FORMAT:
        found = described.get("format") if described else "no graph"
        raise GraphFormatError(f"expected a graph of format {FORMAT} in {path}, found {found}")
    tensors |= {name: tensors[first] for name, first in described["aliases"].items()}
    graph = fx.GraphModule(torch.nn.Module(), fx.Graph())
    nodes: dict[str, fx.Node] = {}
    for entry in described["nodes"]:
        if entry["op"] == "get_attr":
            set_tensor(graph, entry["target"], tensors[entry["target"]])
        nodes[entry["name"]] = node = graph.graph.create_node(
            entry["op"],
            _target(entry["target"]) if entry["op"] == "call_function" else entry["target"],
            tuple(_decode(a, nodes) for a in entry["args"]),
            {k: _decode(v, nodes) for k, v in entry["kwargs"].items()},
            name=entry["name"],
        )
        if entry.get("source"):
            node.meta["source"] = entry["source"]
    graph.meta.update(described["meta"])
    for kind in TENSORS:
        kept = {n.removeprefix(f"{kind}/"): t for n, t in tensors.items() if n.startswith(f"{kind}/")}
        if kept:
            graph.meta[kind] = kept
    graph.recompile()
    return graph


def _shared(value: torch.Tensor) -> bool:
    return (
        value.untyped_storage().nbytes() != value.numel() * value.element_size() or not value.is_contiguous()
    )


def _node(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function":
        if isinstance(target, torch._ops.OpOverload):
            target = str(target)
        else:
            names = [name for name, function in _PYTHON.items() if function is target]
            if not names:
                raise GraphFormatError(
                    f"cannot save {node.format_node()}: {target} is not a registered operator"
                )
            target = names[0]
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_encode(a) for a in node.args],
        "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
        "source": node.meta.get("source"),
    }


def _target(name: str) -> Any:
    if name in _PYTHON:
        return _PYTHON[name]
    try:
        namespace, operation, overload = name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    except (ValueError, AttributeError) as error:
        raise GraphFormatError(
            f"the graph calls {name}, which this torch ({torch.__version__}) lacks"
        ) from error


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
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        decoders: dict[str, Any] = {
            "node": nodes.get,
            "torch": lambda n: getattr(torch, n),
            "device": torch.device,
            "float": float.fromhex,
        }
        return decoders[kind](content)
    return value
