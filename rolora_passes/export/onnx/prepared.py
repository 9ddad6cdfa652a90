"""A graph as it is lowered, and what is known of its nodes before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.decoding.positions import position_only, tabulate
from rolora_passes.errors import LoweringError
from rolora_passes.graphs.buffers import constant_nodes
from rolora_passes.graphs.graph import argument, get_tensor, is_op
from rolora_passes.graphs.shapes import infer_symbols

Node = Any
"""An `fx.Node`; to a type checker `Any`, for what its arguments are its operator says."""

# Whose row s of a result [B, S, ..] depends on row s of its operands [B, S, ..] alone.
_ROWWISE = (
    "add", "sub", "mul", "div", "pow", "neg", "exp", "tanh", "sigmoid", "relu", "silu", "gelu",
    "linear", "rms_norm", "layer_norm", "hadamard", "kronecker", "fake_quantize", "fake_quantize_static",
    "unflatten", "flatten",
)  # fmt: skip


class Prepared:
    """A graph with what its lowering asks of it.

    Args:
        max_length: of the program; what depends on positions alone is known for each of so many.
        accuracy_level: of products with quantized weights; see `to_onnx`.
        last_token: a decoder's logits are wanted for each row's last token alone.

    Attributes:
        inputs: the names of the graph's inputs.
        cached: it is a decoder, which gets key-value caches.
        shapes: sizes and type of every value. A size is a number, the name of a dynamic one, or None for
            what follows from those.
        constants: nodes that depend on parameters alone.
        tables: values that depend on positions alone, at every position; see `positions.tabulate`.
        narrowed: nodes whose last token alone is computed: what nothing but the logits is made of.
    """

    def __init__(
        self, module: fx.GraphModule, max_length: int, accuracy_level: int | None, last_token: bool
    ) -> None:
        self.module, self.max_length, self.accuracy_level = module, max_length, accuracy_level
        self.shapes = infer_symbols(module)
        self.constants = constant_nodes(module.graph)
        placeholders = module.graph.find_nodes(op="placeholder")
        self.inputs = [str(node.target) for node in placeholders]
        self.tables: dict[fx.Node, tuple[Tensor, int]] = {}
        self._by_position: set[fx.Node] = set()
        for node in placeholders:
            if node.target == "positions":
                self.tables = tabulate(module, node, max_length)
                self._by_position = position_only(module.graph, node)
        self.cached = self._is_decoder()
        self.last_token = last_token and self.cached
        self.narrowed = self._narrowed() if self.last_token else set()

    def computed(self) -> list[fx.Node]:
        """The nodes that operators of a program compute: neither constant nor tabulated."""
        skipped = self.constants | self._by_position
        return [n for n in self.module.graph.nodes if n.op == "call_function" and n not in skipped]

    def shape(self, node: Node) -> Any:
        return self.shapes[node][0]

    def rank(self, node: Node) -> int:
        return len(self.shapes[node][0])

    def dtype(self, node: Node) -> torch.dtype:
        return self.shapes[node][1]

    def parameter(self, node: Node) -> Tensor:
        """The tensor of a constant node.

        Raises:
            LoweringError: it is an expression; FoldConstants evaluates those.
        """
        if node.op != "get_attr":
            raise LoweringError(
                f"expected a parameter, found the expression `{node.name}`: run fold-constants"
            )
        return get_tensor(self.module, str(node.target))

    def _is_decoder(self) -> bool:
        attentions = [n for n in self.module.graph.nodes if is_op(n, "attention")]
        causal = all(argument(n, "causal") for n in attentions)
        return self.inputs == ["tokens", "positions"] and bool(attentions) and causal

    def _narrowed(self) -> set[fx.Node]:
        found = {self.module.graph.output_node()}
        for node in reversed(self.module.graph.nodes):
            alone = all(user in found for user in node.users)
            if node.op == "call_function" and node not in self.constants and alone and self._is_rowwise(node):
                found.add(node)
        return found

    def _is_rowwise(self, node: Node) -> bool:
        """Whether a node may be computed for one token alone."""
        if not is_op(node, *_ROWWISE) or not all(a in self.shapes for a in [node, *node.all_input_nodes]):
            return False
        values = [node, *(a for a in node.all_input_nodes if a not in self.constants)]
        return all(self.shape(v)[:2] == ("batch", "length") and self.rank(v) > 2 for v in values)


Reads = Callable[[Prepared, Node], Sequence[Node]]
"""The nodes whose values a lowering reads: fewer than its inputs, where a kernel does their work too."""
