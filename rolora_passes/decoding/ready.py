"""What every lowering does to a graph first: the kernels' type, and parameters in place of expressions."""

from __future__ import annotations

import torch
from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.graphs.buffers import constant_nodes
from rolora_passes.graphs.dtypes import convert, dtype_of
from rolora_passes.graphs.evaluate import evaluate
from rolora_passes.graphs.folding import fold, rounds
from rolora_passes.graphs.graph import KEPT, add_parameter, copy_graph, finish, is_op, leaves
from rolora_passes.graphs.info import info
from rolora_passes.graphs.verify import verify_same

# Every value of these is one of float32 too, so widening a graph of them rounds nothing.
_NARROWER = (torch.bfloat16, torch.float16)


def ready(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy in float32, the type the kernels compute in, whose constant expressions are parameters.

    Expressions that passes left (a rotation of a weight) are folded as FoldConstants does it, in float64, and
    the result is compared with the graph. A graph with caches is taken as it is: AddKVCache has done this.

    Raises:
        LoweringError: the graph is in a type that float32 does not hold, or has caches and expressions.
        VerificationError: folding changed the function.
    """
    dtype = dtype_of(graph)
    if dtype != torch.float32 and dtype not in _NARROWER:
        raise LoweringError(
            f"expected a graph in torch.float32, which the kernels compute in, or in a type that it holds, "
            f"found {dtype}; convert it first: rolora_passes.graphs.convert(graph, torch.float32)"
        )
    result = copy_graph(graph) if dtype == torch.float32 else convert(graph, torch.float32)
    if info(graph).cached is not None:
        for node in _expressions(result):
            raise LoweringError(
                f"expected parameters in a graph with caches, found the expression `{node.name}` "
                f"({node.target}): run fold-constants before add-kv-cache"
            )
        return result
    if any(node.op != "get_attr" for node in leaves(result)):
        before = copy_graph(result)
        fold(result)
        if not rounds(before):
            verify_same(before, result, "folding", set())
    _fold_dequantized(result)
    return result


def _fold_dequantized(graph: fx.GraphModule) -> None:
    """Make parameters of what is computed from dequantized weights alone (W + B·A with quantized factors).

    FoldConstants leaves dequantizations to the kernels that read them; nothing reads these but arithmetic.
    """
    for node in _expressions(graph):
        (value,) = evaluate(graph, [node])
        value = value.float() if value.is_floating_point() else value
        node.replace_all_uses_with(add_parameter(graph, f"folded.{node.name}", value))
    finish(graph)


def _expressions(graph: fx.GraphModule) -> list[fx.Node]:
    """What is computed from parameters alone and read by the rest, what kernels dequantize excepted."""
    known = constant_nodes(graph.graph)
    tops = [n for n in graph.graph.nodes if n in known and any(u not in known for u in n.users)]
    return [n for n in tops if n.op != "get_attr" and not is_op(n, *KEPT)]
