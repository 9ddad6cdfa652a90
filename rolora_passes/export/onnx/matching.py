"""Deciding what computes every node, before anything is written."""

from __future__ import annotations

from typing import Any

from torch import fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.onnx.emitter import Kernels, Match, OnnxEmitter, Result
from rolora_passes.export.onnx.prepared import Prepared
from rolora_passes.graphs.graph import KEPT, op_name
from rolora_passes.graphs.sources import source_of

_LEAVES = ("get_attr", "placeholder")  # which are made where they are first read


def match_all(graph: Prepared, kernels: Kernels) -> list[Match]:
    """The matches that compute a graph, in order.

    From the last node to the first: what a kernel does besides is then needed by nobody, and left out.

    Raises:
        LoweringError: operators that have no lowering: all of them, with where they come from.
    """
    _require_lowerings(graph, kernels)
    needed, given, found = {*graph.module.graph.output_node().all_input_nodes}, set[fx.Node](), list[Match]()
    for node in reversed(graph.module.graph.nodes):
        if node not in needed or node in given or node.op in _LEAVES:
            continue
        match = _match(graph, kernels, node)
        found.append(match)
        needed.update(match.reads)
        given.update(match.gives)
    return sorted(found, key=lambda match: match.root)


def _match(graph: Prepared, kernels: Kernels, node: fx.Node) -> Match:
    """A pattern that gives the node's value, or the lowering of its operator."""
    if node in graph.tables:
        return Match(node, (node,), (), lambda e: [e.row(node)])
    for pattern in kernels.patterns:
        if (match := pattern(graph, node, kernels.lowerings)) is not None:
            return match
    name = op_name(node)
    reads = kernels.reads[name](graph, node) if name in kernels.reads else node.all_input_nodes
    return Match(node, (node,), tuple(reads), lambda e: [_lowered(e, kernels, node)])


def _lowered(e: OnnxEmitter, kernels: Kernels, node: Any) -> Result:
    name = op_name(node)
    if name not in kernels.lowerings:
        raise LoweringError(f"no lowering of {node.target}")
    return kernels.lowerings[name](e, node)


def write_all(e: OnnxEmitter, matches: list[Match]) -> None:
    """Write matches in order; what cannot be lowered is collected, to be told together.

    Raises:
        LoweringError: there is some.
    """
    refused = []
    for match in matches:
        try:
            e.write(match)
        except LoweringError as error:
            refused.append(f"  {error} ({_where(match.root)})")
    if refused:
        raise LoweringError("\n".join([f"{len(refused)} nodes cannot be lowered to ONNX:", *refused]))


def _require_lowerings(graph: Prepared, kernels: Kernels) -> None:
    """Refuse operators that have none, all at once and before anything is written."""
    known = {*kernels.lowerings, *KEPT}
    if lacking := [node for node in graph.computed() if op_name(node) not in known]:
        lines = "\n".join(f"  {n.target}: {_where(n)}" for n in lacking)
        raise LoweringError(
            f"{len(lacking)} nodes have operators without a lowering to ONNX; express them by others, or add "
            f"a lowering to rolora_passes/export/onnx/standard.py:\n{lines}"
        )


def _where(node: fx.Node) -> str:
    """The line of the model that made a node, where capture has kept it."""
    return f"`{node.name}`{source_of(node)}"
