"""From `forward(tokens, positions)` to `forward(tokens, input_pos)` with key and value caches."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

import rolora_passes.graphs.operators  # noqa: F401  (defines torch.ops.rolora)
from rolora_passes.decoding.kv_storage import Cache, Held, held, read_cache, write_cache
from rolora_passes.decoding.positions import position_only, tabulate
from rolora_passes.errors import LoweringError
from rolora_passes.extras import require
from rolora_passes.graphs.buffers import drop_unused
from rolora_passes.graphs.graph import argument, beside, copy_graph, parameter_names, set_tensor
from rolora_passes.graphs.info import info, set_info
from rolora_passes.graphs.inputs import require_decoder
from rolora_passes.graphs.shapes import Shape, infer_static

_aten = torch.ops.aten

STEP = 1e6
"""What masks a score is at least this large."""
_MASK = 1 << 21  # elements of a mask: 8 MB are planned for each, whatever the context
_LEAST = 128  # tokens that a call may have all the same


def require_context(max_length: int) -> None:
    """Refuse a context shorter than the calls whose shapes are compared when a graph is lowered.

    Raises:
        LoweringError: so it is.
    """
    if max_length < 16:
        raise LoweringError(f"expected a context of at least 16 tokens, found max_length {max_length}")


def add_kv_cache(graph: fx.GraphModule, max_length: int) -> fx.GraphModule:
    """Give a canonical graph the state and inputs the ExecuTorch runner drives it with.

    Before:  forward(tokens [B, S], positions [B, S]) -> logits [B, S, V]
             rolora.attention(q, k, v, scale)
    After:   forward(tokens [1, S], input_pos [1]) -> logits [1, S, V]
             llama.update_cache(k, k_cache, start); llama.update_cache(v, v_cache, start)
             llama.custom_sdpa(q, k_cache, v_cache, start, None, 0.0, True, scale)

    Keys and values that stand as `fake_quantize(k, 8)`, what QuantizeKVCache writes, are held in int8: see
    `kv_storage`. What depends on `positions` alone (rotary tables, learned position embeddings) is
    evaluated once for all positions below `max_length`, and read at `start`. The given graph is not
    changed. The result's record (`GraphInfo.cached`) says how many tokens the caches hold, and how many
    a call may have: fewer, if attentions take a mask [S, max_length], which memory is planned for.
    """
    require_context(max_length)
    require_decoder(graph, "a cache")
    require("executorch.extension.llm.custom_ops.custom_ops", "executorch")
    import torch.ao.quantization.fx._decomposed

    result = copy_graph(graph)
    shapes = infer_static(result, {"tokens": (1, None), "positions": (1, None)})
    window = _Window(result, max_length)
    _read_tables(result, window)
    caches: dict[tuple[Held, Held], tuple[Cache, Cache]] = {}
    for node in result.graph.find_nodes(op="call_function", target=torch.ops.rolora.attention.default):
        _cache_attention(result, node, shapes, window, caches)
    drop_unused(result.graph)
    result.graph.lint()
    rebuilt = fx.GraphModule(result, result.graph)  # a fresh signature, and only the tensors in use
    fewer = min(max_length, max(_LEAST, _MASK // max_length))
    call_length = fewer if window.masks else max_length
    set_info(rebuilt, info(result), cached=(max_length, call_length))
    return rebuilt


class _Window:
    """The positions [start, start + S) that one call computes, as nodes at the head of the graph."""

    def __init__(self, module: fx.GraphModule, max_length: int) -> None:
        self.module, self.max_length = module, max_length
        self.masks: dict[int | None, fx.Node] = {}
        self.cache = "cache"  # where caches are named, which is no name of the model's own
        while any(name.startswith(f"{self.cache}.") for name in parameter_names(module)):
            self.cache += "_"
        graph = module.graph
        tokens, self.positions = graph.find_nodes(op="placeholder")
        for size in [n for n in self.positions.users if n.target is _aten.sym_size.int]:
            size.replace_input_with(self.positions, tokens)  # both are [B, S]
        with graph.inserting_after(tokens):
            input_pos = graph.placeholder("input_pos")
        with graph.inserting_before(self.positions.next):
            call = graph.call_function
            self.start = call(_aten.item.default, (input_pos,))
            call(_aten.sym_constrain_range_for_size.default, (self.start,), {"min": 0, "max": max_length - 1})
            self.length = call(_aten.sym_size.int, (tokens, 1))
            self.end = call(operator.add, (self.start, self.length))
            fits = call(operator.le, (self.end, max_length))
            last = call(_aten._assert_scalar.default, (fits, f"more than {max_length} positions"))
        self.head = last.next

    def read(self, name: str, table: Tensor, dim: int) -> fx.Node:
        """The rows of a table [.., max_length, ..] at the window."""
        set_tensor(self.module, name, beside(self.module, table))
        with self.module.graph.inserting_before(self.head):
            whole = self.module.graph.get_attr(name)
            arguments = (whole, dim, self.start, self.length)
            return self.module.graph.call_function(_aten.narrow.default, arguments)

    def places(self, ahead: int) -> fx.Node:
        """Every position of the context, moved by so many: float32 [1, max_length]."""
        name = f"positions.ahead_{ahead}"
        places = torch.arange(self.max_length, dtype=torch.float32)[None] + ahead
        set_tensor(self.module, name, beside(self.module, places))
        return self.module.graph.get_attr(name)


def _read_tables(module: fx.GraphModule, window: _Window) -> None:
    """Replace every maximal value that depends on positions and constants alone by a table."""
    dependent = position_only(module.graph, window.positions)
    tables = tabulate(module, window.positions, window.max_length)
    for index, (node, (table, dim)) in enumerate(tables.items()):
        read = window.read(f"positions.table_{index}", table, dim)
        node.replace_all_uses_with(read, delete_user_cb=lambda user: user not in dependent)
    for node in reversed([n for n in module.graph.nodes if n in dependent]):
        module.graph.erase_node(node)


def _cache_attention(
    module: fx.GraphModule,
    node: fx.Node,
    shapes: dict[fx.Node, tuple[Shape, torch.dtype]],
    window: _Window,
    caches: dict[tuple[Held, Held], tuple[Cache, Cache]],
) -> None:
    """Replace one attention by cache updates and an attention over the caches."""
    q, scale, sliding, softcap = (argument(node, n) for n in ("query", "scale", "window", "softcap"))
    k, v = held(node, "key"), held(node, "value")
    if not argument(node, "causal"):
        raise LoweringError(f"`{node.name}` attends both ways: a key-value cache needs causal attention")
    graph = module.graph
    stored = (shapes[k.value][0], shapes[v.value][0])
    wide = stored[0] != stored[1] or softcap is not None
    mask = _mask(module, sliding, window) if sliding is not None or wide else None
    with graph.inserting_before(node):
        if (k, v) not in caches:
            number, place = len(caches), (window.start, window.max_length)
            caches[k, v] = (
                write_cache(module, f"{window.cache}.key_{number}", k, stored[0], *place),
                write_cache(module, f"{window.cache}.value_{number}", v, stored[1], *place),
            )
        # Float caches need no copy, and a mask has a column for every one of their rows.
        end = window.end if mask is None and (k.int8 or v.int8) else None
        key, value = (read_cache(graph, cache, end) for cache in caches[k, v])
        if wide:
            heads = (shapes[q][0][2], stored[0][2])
            out = _plain_attention(graph, q, key, value, mask, scale, softcap, heads)
        else:
            fused = (q, key, value, window.start, mask, 0.0, mask is None, scale)
            out = graph.call_function(torch.ops.llama.custom_sdpa.default, fused)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _mask(module: fx.GraphModule, sliding: int | None, window: _Window) -> fx.Node:
    """Additive mask [S, max_length]: 0 where a row sees a position, else at most -STEP; one a width.

    -STEP (relu(column - row) + relu(row - column - sliding + 1)), from the positions of this call: a table of
    all rows would grow with the square of the context.
    """
    if sliding in window.masks:
        return window.masks[sliding]
    graph, places = module.graph, torch.arange(window.max_length, dtype=torch.float32)
    row = window.read("positions.row", places[:, None], 0)
    call = graph.call_function
    with graph.inserting_before(window.head):
        unseen = call(_aten.relu.default, (call(_aten.sub.Tensor, (window.places(0), row)),))
        if sliding is not None:
            behind = call(_aten.sub.Tensor, (row, window.places(sliding - 1)))
            unseen = call(_aten.add.Tensor, (unseen, call(_aten.relu.default, (behind,))))
        window.masks[sliding] = call(_aten.mul.Tensor, (unseen, -STEP))
    return window.masks[sliding]


def _plain_attention(
    graph: fx.Graph,
    q: fx.Node,
    key: fx.Node,
    value: fx.Node,
    mask: fx.Node | None,
    scale: float,
    softcap: float | None,
    heads: tuple[int | None, int | None],
) -> fx.Node:
    """Attention over whole caches in plain ops, for what the fused kernel does not compute.

    q [1, S, H, D], key [1, L, H_kv, D], value [1, L, H_kv, D_v], mask [S, L] -> [1, S, H, D_v]
    """
    call, groups = graph.call_function, (heads[0] or 0) // (heads[1] or 1)
    split = call(_aten.unflatten.int, (q, 2, [heads[1], groups]))
    rows = call(_aten.permute.default, (split, [0, 2, 3, 1, 4]))  # [1, H_kv, G, S, D]
    columns = call(_aten.unsqueeze.default, (call(_aten.permute.default, (key, [0, 2, 3, 1])), 2))
    scores = call(_aten.mul.Tensor, (call(_aten.matmul.default, (rows, columns)), scale))
    if softcap is not None:
        bounded = call(_aten.tanh.default, (call(_aten.mul.Tensor, (scores, 1.0 / softcap)),))
        scores = call(_aten.mul.Tensor, (bounded, softcap))
    weights = call(_aten.softmax.int, (call(_aten.add.Tensor, (scores, mask)), -1))
    values = call(_aten.unsqueeze.default, (call(_aten.permute.default, (value, [0, 2, 1, 3])), 2))
    mixed = call(_aten.matmul.default, (weights, values))  # [1, H_kv, G, S, D_v]
    back = call(_aten.permute.default, (mixed, [0, 3, 1, 2, 4]))
    return call(_aten.flatten.using_ints, (back, 2, 3))
