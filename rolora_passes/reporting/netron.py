"""Graphs for Netron and other ONNX viewers: the nodes as they are, without weight data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from rolora_passes.extras import require
from rolora_passes.files import writing
from rolora_passes.graphs.facts import facts
from rolora_passes.graphs.graph import op_name, root_names
from rolora_passes.inspection.diff import literals
from rolora_passes.inspection.structure import formula
from rolora_passes.reporting.drawing import Drawing


def write_netron(graph: fx.GraphModule, path: str | Path, sqnr: Mapping[str, float] | None = None) -> Path:
    """Write a graph as an ONNX file for viewing only; no runtime knows its operators.

    Operators keep their names, in the domains `aten` and `rolora`. Weights have types and shapes but no data.
    A node's metadata has its module, bits, basis and SQNR. Values that depend on positions only are drawn
    once, and layers read them as if they were stored: edges to every layer would hide the rest of the graph
    and slow down a viewer's layout.

    Args:
        sqnr: SQNR in dB by node name, as `track_errors` measures it.

    Raises:
        MissingExtraError: `onnx` is not installed.
    """
    onnx, path = require("onnx", "onnx"), Path(path)
    file = _File(onnx, Drawing(graph), sqnr)
    domains = [onnx.helper.make_opsetid(domain, 1) for domain in ("aten", "rolora", "python")]
    model = onnx.helper.make_model(
        file.graph(path.stem), opset_imports=domains, producer_name="rolora-passes"
    )
    onnx.helper.set_model_props(model, {"facts": ", ".join(facts(graph))})
    with writing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return path


class _File:
    """The parts of the file."""

    def __init__(self, onnx: Any, drawing: Drawing, sqnr: Mapping[str, float] | None) -> None:
        self.onnx, self.drawing = onnx, drawing
        self.overlays = drawing.overlays(sqnr)
        self.stored = self._stored()

    def _stored(self) -> dict[fx.Node, str]:
        """Names of the weights that nodes read (those of their parameters), and of values from positions."""
        names: dict[str, fx.Node] = {}
        beside = set(self.drawing.layers.beside)
        for node in self.drawing.nodes:
            for read in node.all_input_nodes:
                if read in self.drawing.layers.weights and read not in names.values():
                    name = root_names(read)[0]
                    names[name if name not in names else f"{name} {read.name}"] = read
                elif read in beside and node not in beside:
                    names[f"{read.name} of positions"] = read
        return {node: name for name, node in names.items()}

    def graph(self, name: str) -> Any:
        computed = [n for n in self.drawing.nodes if n.op == "call_function"]
        inputs = [n for n in self.drawing.nodes if n.op == "placeholder"]
        (output,) = (n for n in self.drawing.nodes if n.op == "output")
        return self.onnx.helper.make_graph(
            [self._node(n) for n in computed],
            name,
            [self._value(n) for n in inputs],
            [self._value(n) for n in output.all_input_nodes],
            [self._tensor(n) for n in self.stored],
            value_info=[self._value(n) for n in computed],
        )

    def _node(self, node: fx.Node) -> Any:
        target: Any = node.target
        module, beside = self.drawing.module(node), node in self.drawing.layers.beside
        made = self.onnx.helper.make_node(
            op_name(node),
            [
                a.name if beside and a in self.drawing.nodes else self.stored.get(a, a.name)
                for a in node.all_input_nodes
            ],
            [node.name],
            name=f"{module}.{node.name}" if module else node.name,
            domain=target.namespace if isinstance(target, torch._ops.OpOverload) else "python",
        )
        for key, value in literals(node).items():
            if value is not None:
                plain = value if isinstance(value, (int, float, str)) else str(value)
                made.attribute.append(self.onnx.helper.make_attribute(key, plain))
        words = {"summary": self.drawing.words.phrase(node), "module": module}
        words |= {
            name: str(values[node.name]) for name, values in self.overlays.items() if node.name in values
        }
        self.onnx.helper.set_metadata_props(made, {key: value for key, value in words.items() if value})
        return made

    def _value(self, node: fx.Node) -> Any:
        sizes = self.drawing.sizes(node)
        if sizes is None:
            return self.onnx.helper.make_empty_tensor_value_info(node.name)
        dtype, shape = sizes
        return self.onnx.helper.make_tensor_value_info(node.name, self._type(dtype), shape)

    def _tensor(self, node: fx.Node) -> Any:
        """A stored tensor, without its data."""
        drawing, kinds = self.drawing, self.onnx.TensorProto
        weight, sizes = node in drawing.layers.weights, drawing.sizes(node)
        dtype, shape = sizes or (torch.int64, [])  # a size used in the computation
        bits = drawing.width(node) if weight else 64
        few = kinds.INT4 if bits <= 4 else kinds.INT8
        tensor = kinds(
            name=self.stored[node],
            data_type=few if bits <= 8 else self._type(dtype),
            dims=[size if isinstance(size, int) else 0 for size in shape],
            data_location=kinds.EXTERNAL,
        )
        if weight:
            tensor.doc_string = f"{drawing.words.stored(node)} = {formula(drawing.words.source(node))}"
        tensor.external_data.add(key="location", value="left out")
        return tensor

    def _type(self, dtype: torch.dtype) -> int:
        """ONNX's number for a dtype; float32 is FLOAT there, and float64 DOUBLE."""
        name = str(dtype).removeprefix("torch.").upper()
        known = {"FLOAT32": "FLOAT", "FLOAT64": "DOUBLE"}.get(name, name)
        return int(self.onnx.TensorProto.DataType.Value(known))
