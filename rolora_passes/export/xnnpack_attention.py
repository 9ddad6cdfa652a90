"""Attention of a call that starts at position 0, the usual prefill, over its own keys and values.

There XNNPACK's batched products and softmax take a quarter of the time of the kernel over the caches.

    Before:  custom_sdpa(q, k_cache, v_cache, start, ..)
    After:   cond(input_pos == 0, delegate(q, k, v, mask [S, S]), custom_sdpa(q, k_cache, v_cache, start, ..))
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import fx

from rolora_passes.export.shapes import Shape
from rolora_passes.export.xnnpack_emitter import Typed
from rolora_passes.export.xnnpack_graph import Delegate
from rolora_passes.export.xnnpack_signature import Signature, call_delegate
from rolora_passes.graphs.graph import get_tensor, set_tensor

_aten, _llama = torch.ops.aten, torch.ops.llama


def attend_to_fresh(module: fx.GraphModule, shapes: dict[fx.Node, Typed]) -> None:
    """Give every causal attention of a whole call the cheaper way for calls that start at 0, in place."""
    found = [
        node
        for node in module.graph.find_nodes(op="call_function", target=_llama.custom_sdpa.default)
        if node.args[4] is None and shapes[node.args[0]][0][1] is None
    ]
    if not found:
        return
    first, mask = _head(module, get_tensor(module, found[0].args[1].target).shape[1])
    for number, node in enumerate(found):
        q, key_cache, value_cache, start = node.args[:4]
        k, v = (_written(cache) for cache in (key_cache, value_cache))
        operands = (q, k, v, mask, key_cache, value_cache, start)
        sizes = [shapes[n][0] for n in (q, k, v)]
        fresh = _add(module, f"fresh_{number}", _fresh_branch(sizes, float(node.args[7])), node)
        cached = _add(module, f"cached_{number}", _cached_branch(node.args[5:]), node)
        with module.graph.inserting_before(node):
            result = module.graph.call_function(torch.ops.higher_order.cond, (first, fresh, cached, operands))
            out = module.graph.call_function(operator.getitem, (result, 0))
        node.replace_all_uses_with(out)
        module.graph.erase_node(node)


def _head(module: fx.GraphModule, length: int) -> tuple[fx.Node, fx.Node]:
    """Whether the call starts at 0, and the causal mask of its tokens."""
    graph = module.graph
    tokens, position = graph.find_nodes(op="placeholder")
    set_tensor(module, "positions.causal", torch.full((length, length), float("-inf")).triu(1))
    size = next(n for n in tokens.users if n.target is _aten.sym_size.int)
    with graph.inserting_after(size):
        table = graph.get_attr("positions.causal")
    with graph.inserting_after(table):
        rows = graph.call_function(_aten.narrow.default, (table, 0, 0, size))
    with graph.inserting_after(rows):
        mask = graph.call_function(_aten.narrow.default, (rows, 1, 0, size))
    with graph.inserting_after(mask):
        return graph.call_function(_aten.eq.Scalar, (position, 0)), mask


def _written(cache: fx.Node) -> fx.Node:
    """What this call writes into a cache."""
    update = next(n for n in cache.users if n.target is _llama.update_cache.default)
    fresh = update.args[0]
    assert isinstance(fresh, fx.Node)
    return fresh


def _add(module: fx.GraphModule, name: str, branch: fx.GraphModule, before: fx.Node) -> fx.Node:
    module.add_module(name, branch)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def _cached_branch(others: tuple[Any, ...]) -> fx.GraphModule:
    graph = fx.Graph()
    q, _, _, _, keys, values, start = (graph.placeholder(n) for n in ("q", "k", "v", "mask", "keys", "values", "start"))
    graph.output((graph.call_function(_llama.custom_sdpa.default, (q, keys, values, start, None, *others)),))
    return fx.GraphModule({}, graph)


def _fresh_branch(shapes: list[Shape], scale: float) -> fx.GraphModule:
    delegate = Delegate()
    inputs = [delegate.input(s) for s in (*shapes, (None, None))]
    delegate.mark_outputs([_attention(delegate, *inputs, scale)])
    blob, data = delegate.finish()
    lowered = LoweredBackendModule(Signature(shapes, [shapes[0]]), "XnnpackBackend", blob, [], data)
    graph = fx.Graph()
    q, k, v, mask, _, _, _ = (graph.placeholder(n) for n in ("q", "k", "v", "mask", "keys", "values", "start"))
    call = graph.call_function(call_delegate, (graph.get_attr("delegate"), q, k, v, mask))
    graph.output((graph.call_function(operator.getitem, (call, 0)),))
    return fx.GraphModule({"delegate": lowered}, graph)


def _attention(d: Delegate, q: int, k: int, v: int, mask: int, scale: float) -> int:
    """q [1, S, H, D], k and v [1, S, G, D], mask [S, S] -> [1, S, H, D]"""
    whole = d.shapes[q]
    (_, _, heads, width), groups = whole, d.shapes[k][2]
    assert heads and groups and width
    each = heads // groups
    q = d.reshape(d.node("Multiply", whole, input1_id=q, input2_id=d.constant(torch.tensor([scale]))), (None, groups, each, width))
    k, v = (d.reshape(x, (None, groups, 1, width)) for x in (k, v))
    q, k, v = d.permute(q, (1, 2, 0, 3)), d.permute(k, (1, 2, 3, 0)), d.permute(v, (1, 2, 0, 3))
    square = (groups, each, None, None)
    scores = d.node("BatchMatrixMultiply", square, input1_id=q, input2_id=k)
    scores = d.node("Add", square, input1_id=scores, input2_id=mask)
    weights = d.node("Softmax", square, input_id=scores)
    mixed = d.node("BatchMatrixMultiply", (groups, each, None, width), input1_id=weights, input2_id=v)
    return d.reshape(d.permute(mixed, (2, 0, 1, 3)), whole)
