"""Attention of a call that starts at position 0, the usual prefill, over its own keys and values.

XNNPACK's batched products and softmax take a quarter of the time of the kernel over the caches, though
they compute the masked half too. Whether a call is such a one is known only when it runs.

    Before:  custom_sdpa(q, k_cache, v_cache, start, ..)
    After:   cond(first, delegate(q, k, v, ramp), custom_sdpa(q, k_cache, v_cache, start, ..))

Of an int8 cache, attention reads the rows 0 .. start + S - 1, dequantized: from position 0 those are the keys
and values of the call itself, as the cache gives them back, and both ways read them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import fx

from rolora_passes.decoding.kv_cache import STEP
from rolora_passes.decoding.kv_storage import cache_of
from rolora_passes.export.executorch.xnnpack.delegate import Delegate
from rolora_passes.export.executorch.xnnpack.emitter import Typed
from rolora_passes.export.executorch.xnnpack.signature import Signature, call_delegate
from rolora_passes.graphs.graph import get_tensor, set_tensor
from rolora_passes.graphs.shapes import Shape

_aten, _llama = torch.ops.aten, torch.ops.llama

_LONGEST = 512  # the scores of all heads are in memory at once: 1 MB a head
_OPERANDS = ("q", "k", "v", "ramp", "key_cache", "value_cache", "start")


def attend_to_fresh(module: fx.GraphModule, shapes: dict[fx.Node, Typed]) -> int:
    """Let causal attentions of all tokens take the cheaper way where they can; returns their number."""
    found = [
        node
        for node in module.graph.find_nodes(op="call_function", target=_llama.custom_sdpa.default)
        if node.args[4] is None and shapes[node.args[0]][0][1] is None
    ]
    if not found:
        return 0
    first, ramp = _head(module, get_tensor(module, str(cache_of(found[0].args[1]).target)).shape[1])
    for number, node in enumerate(found):
        q, key_cache, value_cache, start, _, *others, scale = node.args
        written = [_written(cache_of(read)) for read in (key_cache, value_cache)]
        shared = key_cache.op != "get_attr"  # read as far as they are filled: both ways take the same
        names = [n for n in _OPERANDS if not shared or n not in ("k", "v")]
        fresh = ("q", "key_cache", "value_cache", "ramp") if shared else ("q", "k", "v", "ramp")
        nodes = dict(zip(_OPERANDS, (q, *written, ramp, key_cache, value_cache, start), strict=True))
        branches = {
            f"fresh_{number}": _fresh_branch(names, fresh, [shapes[n][0] for n in (q, *written)], scale),
            f"cached_{number}": _cached_branch(names, (None, *others, scale)),
        }
        for name, branch in branches.items():
            module.add_module(name, branch)
        with module.graph.inserting_before(node):
            attributes = [module.graph.get_attr(name) for name in branches]
            operands = tuple(nodes[n] for n in names)
            chosen = module.graph.call_function(torch.ops.higher_order.cond, (first, *attributes, operands))
            out = module.graph.call_function(operator.getitem, (chosen, 0))
        node.replace_all_uses_with(out)
        module.graph.erase_node(node)
    return len(found)


def _head(module: fx.GraphModule, length: int) -> tuple[fx.Node, fx.Node]:
    """Whether a call of S tokens starts at 0 and is short enough; and 0, STEP, .., (S - 1) STEP."""
    tokens, position = module.graph.find_nodes(op="placeholder")
    # One longer than any call: reading all of a table would be a case of its own to torch.export.
    set_tensor(module, "positions.ramp", torch.arange(length + 1) * STEP)
    with module.graph.inserting_before(position.next):
        call = module.graph.call_function
        size = call(_aten.sym_size.int, (tokens, 1))
        far = call(_aten.mul.Scalar, (position, _LONGEST))
        first = call(_aten.le.Scalar, (call(_aten.add.Scalar, (far, size)), _LONGEST))
        table = module.graph.get_attr("positions.ramp")
        return first, call(_aten.narrow.default, (table, 0, 0, size))


def _written(cache: fx.Node) -> fx.Node:
    """What this call writes into a cache."""
    update = next(n for n in cache.users if n.target is _llama.update_cache.default)
    fresh = update.args[0]
    assert isinstance(fresh, fx.Node)
    return fresh


def _cached_branch(names: Sequence[str], others: tuple[Any, ...]) -> fx.GraphModule:
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in names}
    cached = (given[name] for name in ("q", "key_cache", "value_cache", "start"))
    graph.output((graph.call_function(_llama.custom_sdpa.default, (*cached, *others)),))
    return fx.GraphModule({}, graph)


def _fresh_branch(
    names: Sequence[str], read: Sequence[str], shapes: Sequence[Shape], scale: float
) -> fx.GraphModule:
    """Attention of q [1, S, H, D] to k and v [1, S, G, D] as a delegate."""
    delegate, inputs = Delegate(), [*shapes, (None,)]
    delegate.mark_outputs([_attention(delegate, scale, *map(delegate.input, inputs))])
    blob, data = delegate.finish()
    lowered = LoweredBackendModule(Signature(inputs, shapes[:1]), "XnnpackBackend", blob, [], data)
    graph = fx.Graph()
    given = {name: graph.placeholder(name) for name in names}
    arguments = (graph.get_attr("delegate"), *(given[name] for name in read))
    call = graph.call_function(call_delegate, arguments)
    graph.output((graph.call_function(operator.getitem, (call, 0)),))
    return fx.GraphModule({"delegate": lowered}, graph)


def _attention(d: Delegate, scale: float, q: int, k: int, v: int, ramp: int) -> int:
    whole = d.shapes[q]
    (_, _, heads, width), groups = whole, d.shapes[k][2]
    assert heads is not None and groups is not None
    square = (groups, heads // groups, None, None)
    scaled = d.node("Multiply", whole, input1_id=q, input2_id=d.constant(torch.tensor([scale])))
    rows = d.permute(d.reshape(scaled, (None, groups, heads // groups, width)), (1, 2, 0, 3))
    keys = d.permute(d.reshape(k, (None, groups, 1, width)), (1, 2, 3, 0))
    values = d.permute(d.reshape(v, (None, groups, 1, width)), (1, 2, 0, 3))
    scores = d.matmul(rows, keys, square)
    scores = d.node("Add", square, input1_id=scores, input2_id=_mask(d, ramp))
    weights = d.node("Softmax", square, input_id=scores)
    mixed = d.matmul(weights, values, (*square[:3], width))
    return d.reshape(d.permute(mixed, (2, 0, 1, 3)), whole)


def _mask(d: Delegate, ramp: int) -> int:
    """[S, S]: 0 where the row is at or after the column, else at most -STEP."""
    column, row = d.reshape(ramp, (None, 1)), d.reshape(ramp, (1, None))
    ahead = d.node("Subtract", (None, None), input1_id=column, input2_id=row)
    zero = d.constant(torch.tensor([0.0]))
    return d.node("Minimum", (None, None), input1_id=ahead, input2_id=zero)
