"""Running a graph over many windows of tokens in stages, while what is still to come is rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.buffers import constant_nodes
from rolora_passes.graphs.devices import place_of
from rolora_passes.graphs.evaluate import call, compute, deaths, let_go
from rolora_passes.graphs.graph import argument, is_op, upstream
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.running import large_weight, looked_up
from rolora_passes.ondisk import is_on_disk, kept, memory_left, rest


class Stages:
    """The forward passes of N windows, kept in step: all of them stand behind the same node.

    Together the stages are one forward pass for every window. Between them the memory is N times the
    *frontier*, the values that later nodes read; above a number of bytes it lies in the spill folder
    (`ondisk.spilling`). What no window changes (parameters, expressions over them, what positions alone
    decide) is computed once a stage, when it is first read, and kept no longer; of a large table, no more
    than the rows that a window reads.

        stages = Stages(graph, tokens)
        for value in stages.advance(node): ...      # node's value, window by window
        ...                                         # rewrite what stands after node
        for value in stages.advance(later): ...

    On a device that the graph's tensors travel to (`graphs.devices`) there is one window at a time; the
    frontier of the others is where the tokens were given.

    Between stages a caller may rewrite the readers of `node` and everything after them, and add parameters.
    """

    def __init__(self, graph: fx.GraphModule, tokens: Tensor, room: int | None = None) -> None:
        """Stand before the first node.

        Args:
            tokens: int64 [N, S].
            room: bytes of memory that the frontier may take; None for no bound.
        """
        self._graph, self._room = graph, room
        self._place, self._home = place_of(graph), tokens.device
        windows = [inputs_for(graph, window) for window in tokens.split(1)]
        inputs: dict[str, fx.Node] = {node.name: node for node in graph.graph.find_nodes(op="placeholder")}
        self._common = {inputs[n]: value for n, value in windows[0].items() if n == "positions"}
        self._inputs = inputs.values() - self._common.keys()
        self._reached: fx.Node | None = None
        self._windows: list[dict[fx.Node, Any]] = [
            {node: window[name].to(self._home) for name, node in inputs.items() if node in self._inputs}
            for window in windows
        ]

    def advance(self, node: fx.Node) -> Iterator[Tensor]:
        """Run every window up to and including a node; yields the node's value for each, batch of one.

        The iterator is to be exhausted: a window that was not asked for has not moved.
        """
        steps, frontier = self._plan(node)
        dead = deaths(steps, {*frontier, node})
        fixed = constant_nodes(self._graph.graph)
        tables = {n: large_weight(self._graph, n, fixed) for n in steps if is_op(n, "embedding")}
        shared: dict[fx.Node, Any] = {}
        for window in self._windows:
            window.update({n: _moved(value, self._place.device) for n, value in window.items()})
            with torch.no_grad():
                value_of = partial(self._value, window, shared)
                for step in steps:
                    table = tables.get(step)
                    if table is None:
                        window[step] = call(step, value_of, None, self._place.device)
                    else:
                        window[step] = looked_up(self._graph, table, value_of(argument(step, "indices")))
                    for value in dead[step]:
                        window.pop(value, None)
                value = value_of(node)
            for stale in window.keys() - frontier:  # the node itself, or what a rewrite stopped reading
                del window[stale]
            window.update({n: _moved(held, self._home) for n, held in window.items()})
            self._park(window)
            yield value
        for read in shared:
            if read.op == "get_attr":
                let_go(self._graph, read)
        self._reached = node

    def _park(self, window: dict[fx.Node, Any]) -> None:
        """Leave a window until its next stage: what is more than there is room for goes to the folder."""
        if self._room is None:
            return
        share = self._room // len(self._windows)
        for node, value in window.items():
            # Others keep their strides, by which results differ in the last bit.
            if not isinstance(value, Tensor) or not value.is_contiguous():
                continue
            if is_on_disk(value):
                rest(value)
            elif value.nbytes > share:
                window[node] = kept(value)
            else:
                share -= value.nbytes

    def _plan(self, node: fx.Node) -> tuple[list[fx.Node], set[fx.Node]]:
        """What a window has to compute up to a node, and which of its values are read behind it.

        Computed afresh every time: the caller has rewritten the graph since.
        """
        place = {n: i for i, n in enumerate(self._graph.graph.nodes)}
        start = -1 if self._reached is None else place[self._reached]
        stop = place[node]
        assert start < stop, f"{node} stands before {self._reached}, where the windows are"
        (output,) = self._graph.graph.find_nodes(op="output")
        needed = upstream([node, output]) - {output}  # returning a value is no reason to keep it
        own = set(self._inputs)  # values that differ between windows
        for n in place:
            if not own.isdisjoint(n.all_input_nodes):
                own.add(n)
        own_steps = (own & needed) - self._inputs
        steps = [n for n in place if start < place[n] <= stop and n in own_steps]
        frontier = {
            n for n in own if place[n] <= stop and any(place[u] > stop and u in needed for u in n.users)
        }
        return steps, frontier

    def _value(self, window: dict[fx.Node, Any], shared: dict[fx.Node, Any], node: fx.Node) -> Any:
        """A value as a window reads it: its own, or one that no window changes."""
        if node in window:
            return window[node]
        if node not in shared:
            (shared[node],) = compute(self._graph, [node], self._common)
        return shared[node]


def room_beside(need: int, what: str) -> int | None:
    """The bytes that windows may keep in memory beside what else a pass needs; None for no bound.

    Args:
        need: bytes.
        what: needs them, for the error.

    Raises:
        PassError: there are fewer (`ondisk.spilling`, `--memory`).
    """
    left = memory_left()
    if left is not None and left < need:
        raise PassError(
            f"{what} needs about {need / 1e9:.1f} GB of memory, found {max(left, 0) / 1e9:.1f} GB left: "
            f"raise the bound by {(need - left) / 1e9:.1f} GB (--memory)"
        )
    return None if left is None else left - need


def _moved(value: Any, device: torch.device) -> Any:
    return fx.node.map_aggregate(value, lambda v: v.to(device) if isinstance(v, Tensor) else v)
