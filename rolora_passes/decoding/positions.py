"""Values that depend on positions alone (rotary tables, learned position embeddings), as tables."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rolora_passes.errors import LoweringError
from rolora_passes.graphs.buffers import constant_nodes
from rolora_passes.graphs.devices import place_of
from rolora_passes.graphs.evaluate import compute


def tabulate(
    module: fx.GraphModule, positions: fx.Node, max_length: int
) -> dict[fx.Node, tuple[Tensor, int]]:
    """Every maximal value that depends on positions and constants alone, at positions 0 .. max_length - 1.

    Returns: for each such node, its table [.., max_length, ..] and which dimension is the position.

    Raises:
        LoweringError: one of them is not a row for each position (it depends on how many there are).
    """
    dependent = position_only(module.graph, positions)
    needed = [n for n in module.graph.nodes if n in dependent and any(u not in dependent for u in n.users)]
    return dict(zip(needed, _evaluate(module, positions, needed, max_length), strict=True))


def position_only(graph: fx.Graph, positions: fx.Node) -> set[fx.Node]:
    """`positions` and all that is computed from it and constants alone, sizes apart."""
    known = constant_nodes(graph)
    dependent = {positions}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        derived = node.op == "call_function" and any(n in dependent for n in inputs)
        sized = node.target is torch.ops.aten.sym_size.int
        if derived and not sized and all(n in known or n in dependent for n in inputs):
            dependent.add(node)
    return dependent


def _evaluate(
    module: fx.GraphModule, positions: fx.Node, needed: list[fx.Node], max_length: int
) -> list[tuple[Tensor, int]]:
    """Values of position-only nodes at 0 .. max_length - 1, and which dimension is the position."""
    if not needed:
        return []
    index = torch.arange(max_length, device=place_of(module).device)[None]
    skip = max_length // 2
    try:
        whole, part = (compute(module, needed, {positions: given}) for given in (index, index[:, skip:]))
    except IndexError as error:
        raise LoweringError(
            f"expected a model with {max_length} positions, found a table that has fewer ({error}): lower "
            "max_length"
        ) from error
    return [
        _check_table(node, table, rest, skip) for node, table, rest in zip(needed, whole, part, strict=True)
    ]


def _check_table(node: fx.Node, whole: Tensor, part: Tensor, skip: int) -> tuple[Tensor, int]:
    dims = [d for d, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
    if len(dims) != 1 or not torch.equal(whole.narrow(dims[0], skip, part.shape[dims[0]]), part):
        raise LoweringError(
            f"`{node.name}` ({node.target}) depends on `positions` but is not a table with one row per "
            f"position (shapes {tuple(whole.shape)} and {tuple(part.shape)}): it cannot be cached"
        )
    return whole.contiguous(), dims[0]
