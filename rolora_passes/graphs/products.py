"""Products of large weights with values, without computing what passes wrote about the weight.

Every exact pass writes W' = L·W·R, L and R maps of one axis, so x·W'ᵀ = L((x·Rᵀ)·Wᵀ): the maps are done to
what goes in and what comes out, a few rows each, in place of the whole matrix. And x·Rᵀ is the same before a
pass and after it, if the pass is exact: then the product with W is known already.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, fx

from rolora_passes.graphs.axis_maps import Way
from rolora_passes.graphs.evaluate import blocks, rows_apart
from rolora_passes.graphs.graph import argument, get_tensor, root_names
from rolora_passes.graphs.lineage import expressions
from rolora_passes.graphs.operators.registry import axis_map
from rolora_passes.graphs.operators.steps import AxisMap, Step
from rolora_passes.ondisk import require_whole, rest

# Values that differ by less, relative to their largest, are the same: far above what float64 rounds in a
# transform, and far below what is allowed of logits.
_SAME = 1e-12
_ROWS = 4  # rows of every weight that are computed as they are written, to see that the maps say the same
_BLOCK = 1 << 17  # elements of a weight that are cast at a time: they stay in a core's cache


class Products:
    """What is known of weights and their products so far, from one graph to the next.

    Tensors are told by themselves: a graph that a pass made shares those that the pass did not compute.

    Attributes:
        off: the largest difference, relative, of an input from that of the product that was taken for it.
    """

    def __init__(self) -> None:
        self.off = 0.0
        self._known: dict[int, list[tuple[weakref.ref[Tensor], Tensor, Tensor]]] = {}
        self._readers: weakref.WeakKeyDictionary[fx.GraphModule, Callable[[fx.Node], Way]]
        self._readers = weakref.WeakKeyDictionary()

    def linear(self, graph: fx.GraphModule, node: fx.Node, x: Tensor) -> Tensor | None:
        """x·W'ᵀ for the input x [.., in] of a linear, in x's type.

        Returns: None if something else than maps of one axis is written on the weight.
        """
        if graph not in self._readers:
            self._readers[graph] = expressions(graph)
        way = self._readers[graph](node)
        if way.reason or way.transposed or way.changed:
            return None
        maps = [(step, axis_map(step.kind)) for step in way.steps if step.kind != "shift"]
        if any(step.place or found.transpose is None for step, found in maps):
            return None
        y = self._mapped(graph, node, way, maps, x)
        return y if _agrees(graph, argument(node, "weight"), x, y) else None

    def _mapped(
        self, graph: fx.GraphModule, node: fx.Node, way: Way, maps: list[tuple[Step, AxisMap]], x: Tensor
    ) -> Tensor:
        def tensors(names: tuple[str, ...]) -> list[Tensor]:
            return [way.tensors[name].to(x) for name in names]

        for step, found in reversed(maps):
            if step.side == "in" and found.transpose is not None:
                x = found.transpose(x, x.dim() - 1, step.numbers, tensors(step.tensors))
        y = self._product(get_tensor(graph, root_names(argument(node, "weight"))[0]), x)
        for step, found in maps:
            if step.side == "out" and found.forth is not None:
                y = found.forth(y, y.dim() - 1, step.numbers, tensors(step.tensors))
        return y

    def _product(self, weight: Tensor, x: Tensor) -> Tensor:
        for reference, given, made in self._known.get(id(weight), ()):
            if reference() is not weight or given.shape != x.shape or given.dtype != x.dtype:
                continue
            off = float((x - given).abs().max()) / (float(given.abs().max()) or 1.0)
            if off <= _SAME:
                self.off = max(self.off, off)
                return made
        require_whole(weight)
        result = x.new_empty(*x.shape[:-1], len(weight))
        step = max(1, _BLOCK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            result[..., rows] = torch.nn.functional.linear(x, weight[rows].to(x))
            rest(weight, weight[rows])
        rest(weight)  # a block reads pages of its neighbours
        known = [entry for entry in self._known.get(id(weight), ()) if entry[0]() is weight]
        self._known[id(weight)] = [*known, (weakref.ref(weight), x, result)]
        return result


def _agrees(graph: fx.GraphModule, weight: fx.Node, x: Tensor, y: Tensor) -> bool:
    """Whether some rows of the weight, as they are written, give what the maps give.

    So it is taken to be where a row cannot be computed for itself.
    """
    if not rows_apart(graph, weight):
        return True
    rows = torch.linspace(0, y.shape[-1] - 1, _ROWS, device=x.device).long()
    ((_, (part,)),) = blocks(graph, [weight], x.dtype, only=rows)
    found = torch.nn.functional.linear(x, part)
    return float((found - y[..., rows]).abs().max()) <= 1e3 * _SAME * float(y.abs().max())
