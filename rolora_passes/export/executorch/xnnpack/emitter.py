"""The state of one delegate's emission, and the names operators go by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.executorch.xnnpack.delegate import Delegate
from rolora_passes.graphs.evaluate import call
from rolora_passes.graphs.graph import KEPT, get_tensor, is_op, op_name
from rolora_passes.graphs.shapes import Shape

Typed = tuple[Shape, torch.dtype]


class DelegateEmitter:
    """The state of one delegate's emission: which value stands for which node."""

    def __init__(self, module: fx.GraphModule, shapes: dict[fx.Node, Typed]) -> None:
        self.module, self.shapes = module, shapes
        self.delegate = Delegate()
        self.values: dict[fx.Node, int] = {}
        self._quantized: dict[int, int] = {}

    def value(self, item: Any) -> int:
        """The value of a node, a parameter or a number."""
        if not isinstance(item, fx.Node):
            return self.delegate.constant(torch.tensor([float(item)]))
        if item not in self.values:
            self.values[item] = self.delegate.constant(self.tensor(item))
        return self.values[item]

    def tensor(self, node: fx.Node) -> Tensor:
        """A parameter, dequantized if it is stored quantized.

        Raises:
            LoweringError: it is an expression; `ready` evaluates those.
        """
        if node.op == "get_attr":
            return get_tensor(self.module, str(node.target))
        if not is_op(node, *KEPT) or any(n.op != "get_attr" for n in node.all_input_nodes):
            raise LoweringError(
                f"expected a parameter, found the expression `{node.name}` ({node.target}): "
                "run fold-constants"
            )
        with torch.no_grad():
            result: Tensor = call(node, self.tensor)
        return result

    def shape(self, node: fx.Node) -> Shape:
        return self.shapes[node][0]

    def quantized(self, value: int) -> int:
        """Dynamic int8 of a value; linears that read one value share it."""
        if value not in self._quantized:
            self._quantized[value] = self.delegate.quantize_rows(value)
        return self._quantized[value]


def op_key(node: fx.Node) -> str:
    """`aten.linear` for any overload of aten's linear; `getitem ..` of an operator; else the empty string."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.replace("::", ".")
    return f"getitem {op_name(node.args[0])}" if is_op(node, "getitem") else ""
