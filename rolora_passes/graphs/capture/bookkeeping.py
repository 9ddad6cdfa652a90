"""What encoders keep beside the text, made plain: positions sliced from a buffer, masks of ones.

    slice(buffer 0 … 511, 1, 0, S)     ->  unsqueeze(arange(S), 0)
    masked_fill(x, ~(ones > 0), -inf)  ->  x
    mul(x, ones)                       ->  x

A graph is then as long as its tables of positions are, and has no arithmetic on masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rolora_passes.graphs.evaluate import call
from rolora_passes.graphs.graph import argument, aten, get_tensor, insert, is_op, op_name
from rolora_passes.graphs.operators import Trait, has
from rolora_passes.graphs.shapes import same_shape, shape_of

_FILLED = {"ones": 1, "zeros": 0, "ones_like": 1, "zeros_like": 0}
_ELEMENTWISE = ("mul", "to", "_to_copy", "bitwise_not", "logical_not", "rsub", "sub", "gt", "eq", "ne")


def count_positions(gm: fx.GraphModule) -> None:
    """Positions that are sliced from a buffer become `arange`, whose length no buffer limits."""
    for node in list(gm.graph.nodes):
        if not is_op(node, "slice") or node.args[0].op != "get_attr" or argument(node, "step") != 1:
            continue
        buffer, dim, end = get_tensor(gm, node.args[0].target), argument(node, "dim"), argument(node, "end")
        last = dim % buffer.dim() == buffer.dim() - 1 and buffer.numel() == buffer.shape[-1]
        if not (last and isinstance(end, fx.Node) and argument(node, "start") in (0, None)):
            continue
        if buffer.is_floating_point() or not buffer.flatten().equal(torch.arange(buffer.numel()).to(buffer)):
            continue
        new = insert(gm, node, aten.arange.default, end, dtype=buffer.dtype, device=buffer.device)
        new.meta = {**node.meta, "val": node.meta["val"].flatten()}
        for _ in range(buffer.dim() - 1):
            new = insert(gm, node, aten.unsqueeze.default, new, 0)
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)


def drop_ones(gm: fx.GraphModule) -> None:
    """Remove products with ones and fills where nothing is masked: rows are unpadded."""
    known = _uniform(gm)
    for node in gm.graph.nodes:
        if is_op(node, "masked_fill") and node.args[1] in known and not known[node.args[1]]:
            _keep(node, node.args[0])
        elif is_op(node, "mul"):
            for x, other in (node.args[:2], node.args[1::-1]):
                if other in known and known[other] == 1 and isinstance(x, fx.Node):
                    _keep(node, x)


def _keep(node: fx.Node, x: fx.Node) -> None:
    if same_shape(x, node) and x.meta["val"].dtype == node.meta["val"].dtype:
        node.replace_all_uses_with(x)


def _uniform(gm: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Values that are one number everywhere, with that number."""
    known: dict[fx.Node, Tensor] = {}
    for node in gm.graph.nodes:
        tensors = [a for a in node.all_input_nodes if shape_of(a) is not None]
        if is_op(node, *_FILLED):
            known[node] = torch.tensor(_FILLED[op_name(node)], dtype=node.meta["val"].dtype)
        elif not tensors or any(a not in known for a in tensors):
            continue
        elif has(node, Trait.VIEW) or is_op(node, "slice"):
            known[node] = known[tensors[0]]
        elif is_op(node, *_ELEMENTWISE):
            known[node] = call(node, known.__getitem__, None, torch.device("cpu"))
    return known
