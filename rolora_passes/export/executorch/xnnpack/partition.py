"""Cutting a graph into XNNPACK delegates and what ExecuTorch's own kernels do between them.

Regions are found by level: the level of a node grows by one each time a path to it changes between
"a delegate can hold it" and "it cannot". Nodes of one level form one delegate, so a decoder layer has one:
what stands between two attentions.

    Before:  update_cache, custom_sdpa, linear, add, rms_norm, linear, silu, .., rms_norm, linear, rotary, ..
    After:   update_cache, custom_sdpa, executorch_call_delegate, update_cache, custom_sdpa, ..

What a call from position 0 computes instead of custom_sdpa is in `attention`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import fx

from rolora_passes.export.executorch.xnnpack.attention import attend_to_fresh
from rolora_passes.export.executorch.xnnpack.emitter import DelegateEmitter, Typed, op_key
from rolora_passes.export.executorch.xnnpack.ops import EMITTERS, supported
from rolora_passes.export.executorch.xnnpack.signature import Signature, call_delegate
from rolora_passes.graphs.buffers import constant_nodes, is_written
from rolora_passes.graphs.graph import copy_graph
from rolora_passes.graphs.shapes import Shape, infer_static


@dataclass
class _Region:
    """Nodes one delegate holds, what it reads and what the others read of it."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def delegate_to_xnnpack(
    graph: fx.GraphModule, inputs: Mapping[str, Shape], fast_prefill: bool
) -> tuple[fx.GraphModule, int]:
    """Replace everything XNNPACK computes by delegates; returns the new graph and their number.

    With `fast_prefill`, calls from position 0 have a delegate for attention too.
    """
    result = copy_graph(graph)
    shapes = infer_static(result, inputs)
    constant = constant_nodes(result.graph)
    regions = _regions(result.graph, shapes, constant)
    for number, nodes in enumerate(regions):
        _replace(result, _region(nodes, shapes, constant), shapes, number)
    prefills = attend_to_fresh(result, shapes) if fast_prefill else 0
    for node in reversed(result.graph.nodes):
        if node in constant and not node.users:
            result.graph.erase_node(node)
    result.graph.lint()
    return fx.GraphModule(result, result.graph), len(regions) + prefills


def _regions(graph: fx.Graph, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> list[list[fx.Node]]:
    """Find the delegates, and sort the graph so that each is contiguous."""
    levels = _levels(graph, shapes, constant)
    output = graph.output_node()
    ordered = sorted((n for n in graph.nodes if n in levels), key=levels.__getitem__)
    for node in ordered:
        output.prepend(node)
    found: dict[int, list[fx.Node]] = {}
    for node in ordered:
        if levels[node] % 2:
            found.setdefault(levels[node], []).append(node)
    return list(found.values())


def _levels(graph: fx.Graph, shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> dict[fx.Node, int]:
    """Level of every computed node: odd in a delegate, even outside.

    A node that reads a cache comes after the last node outside that touched it, so after what wrote it.
    """
    levels: dict[fx.Node, int] = {}
    touched: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in constant:
            continue
        inside = supported(node, shapes, constant)
        before = [levels[n] for n in node.all_input_nodes if n in levels]
        before += [touched[n] for n in node.all_input_nodes if n in touched]
        level = max(before, default=0)
        levels[node] = level + (level % 2 != inside)
        if not inside:
            touched.update({n: levels[node] for n in node.all_input_nodes if is_written(n)})
    return levels


def _region(nodes: list[fx.Node], shapes: dict[fx.Node, Typed], constant: set[fx.Node]) -> _Region:
    members = set(nodes)
    inputs = dict.fromkeys(
        n
        for node in nodes
        for n in node.all_input_nodes
        if n in shapes and n not in members and n not in constant
    )
    outputs = [node for node in nodes if any(user not in members for user in node.users)]
    return _Region(nodes, list(inputs), outputs)


def _replace(module: fx.GraphModule, region: _Region, shapes: dict[fx.Node, Typed], number: int) -> None:
    """Emit one region as a delegate and call it in its place."""
    emitter = DelegateEmitter(module, shapes)
    for node in region.inputs:
        emitter.values[node] = emitter.delegate.input(shapes[node][0])
    for node in region.nodes:
        emitter.values[node] = EMITTERS[op_key(node)](emitter, node)
    emitter.delegate.mark_outputs([emitter.values[n] for n in region.outputs])
    blob, data = emitter.delegate.finish()
    signature = Signature([shapes[n][0] for n in region.inputs], [shapes[n][0] for n in region.outputs])
    lowered = LoweredBackendModule(signature, "XnnpackBackend", blob, [], data)
    name = f"xnnpack_{number}"
    module.add_module(name, lowered)
    with module.graph.inserting_before(region.nodes[0]):
        call = module.graph.call_function(call_delegate, (module.graph.get_attr(name), *region.inputs))
        results = [
            module.graph.call_function(operator.getitem, (call, i)) for i in range(len(region.outputs))
        ]
    for old, new in zip(region.outputs, results, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in set(region.nodes))
    for node in reversed(region.nodes):
        module.graph.erase_node(node)
    shapes.update({new: shapes[old] for old, new in zip(region.outputs, results, strict=True)})
