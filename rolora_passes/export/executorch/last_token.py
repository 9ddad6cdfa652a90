"""Computing the logits of the last token only, which is all a runner samples from."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rolora_passes.export.executorch.xnnpack.emitter import op_key
from rolora_passes.export.executorch.xnnpack.ops import EMITTERS
from rolora_passes.graphs.buffers import constant_nodes, drop_unused
from rolora_passes.graphs.graph import is_op, upstream
from rolora_passes.graphs.shapes import Shape, infer_static

_MIXING = {"aten.matmul", "aten.softmax", "aten.cat", "aten.slice", "aten.permute", "aten.transpose"}


def keep_last_token(graph: fx.GraphModule) -> None:
    """Narrow a graph with caches to its last token, as early as nothing else needs the others.

    Before:  o_proj(custom_sdpa(q, k_cache, v_cache, start, ..)) .. norm, head -> logits [1, S, V]
    After:   o_proj(custom_sdpa(narrow(q, 1, S - 1, 1), k_cache, v_cache, start + S - 1, ..)) .. norm, head
             -> logits [1, 1, V]
    """
    shapes = infer_static(graph, {"tokens": (1, None), "input_pos": (1,)})
    _Narrow(graph, {node: shape for node, (shape, _) in shapes.items()}).run()
    drop_unused(graph.graph)
    graph.recompile()


class _Narrow:
    def __init__(self, graph: fx.GraphModule, shapes: dict[fx.Node, Shape]) -> None:
        self.graph, self.shapes = graph.graph, shapes
        self.constant = constant_nodes(self.graph)
        self.narrowed: dict[fx.Node, fx.Node] = {}
        self.whole = self._needed_whole()

    def run(self) -> None:
        output = self.graph.output_node()
        logits = output.args[0]
        assert isinstance(logits, fx.Node)
        with self.graph.inserting_before(output):
            tokens = self.graph.find_nodes(op="placeholder")[0]
            length = self.graph.call_function(torch.ops.aten.sym_size.int, (tokens, 1))
            self.last = self.graph.call_function(operator.sub, (length, 1))
            output.args = (self.narrow(logits),)

    def _needed_whole(self) -> set[fx.Node]:
        """Everything the caches are written from."""
        return upstream(n for n in self.graph.nodes if n.op == "call_function" and not n.users)

    def narrow(self, node: fx.Node) -> fx.Node:
        """The last token of a value [1, S, ..]; also of the parts of a quantizer, which have no shape."""
        if node in self.constant:
            return node
        if node not in self.narrowed:
            self.narrowed[node] = self._narrow(node)
        return self.narrowed[node]

    def _narrow(self, node: fx.Node) -> fx.Node:
        if node not in self.whole and node.target is torch.ops.llama.custom_sdpa.default:
            return self._attend(*node.args)
        # A quantizer is done again on one row: what reads it has to read a quantizer.
        if (node not in self.whole or is_op(node, "fake_quantize")) and self._rowwise(node):
            return self.graph.node_copy(node, self.narrow)
        return self._last_of(node, 1)

    def _attend(self, query: Any, key: Any, value: Any, start: Any, mask: Any, *others: Any) -> fx.Node:
        """Attention of the last token alone, over the same caches."""
        position = self.graph.call_function(operator.add, (start, self.last))
        row = None if mask is None else self._last_of(mask, 0)
        arguments = (self.narrow(query), key, value, position, row, *others)
        return self.graph.call_function(torch.ops.llama.custom_sdpa.default, arguments)

    def _last_of(self, node: fx.Node, dim: int) -> fx.Node:
        return self.graph.call_function(torch.ops.aten.narrow.default, (node, dim, self.last, 1))

    def _rowwise(self, node: fx.Node) -> bool:
        """Whether row s of a value [1, S, ..] depends on row s of its operands alone."""
        key = op_key(node)
        inputs = [node, *(n for n in node.all_input_nodes if n not in self.constant)]
        return (
            key in EMITTERS
            and key not in _MIXING
            and all(n not in self.shapes or self.shapes[n][1:2] == (None,) for n in inputs)
        )
