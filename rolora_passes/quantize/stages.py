"""Running a graph over many windows of tokens in stages, while what is still to come is rewritten."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.graphs.devices import place_of
from rolora_passes.graphs.evaluate import call, compute, deaths
from rolora_passes.graphs.graph import upstream
from rolora_passes.graphs.inputs import inputs_for


class Stages:
    """The forward passes of N windows, kept in step: all of them stand behind the same node.

    Together the stages are one forward pass for every window. Between them the memory is N times the
    *frontier*, the values that later nodes read. What no window changes (parameters, expressions over
    them, what positions alone decide) is computed once a stage, when it is first read, and kept no longer.

        stages = Stages(graph, tokens)
        for value in stages.advance(node): ...      # node's value, window by window
        ...                                         # rewrite what stands after node
        for value in stages.advance(later): ...

    On a device that the graph's tensors travel to (`graphs.devices`) there is one window at a time; the
    frontier of the others is where the tokens were given.

    Between stages a caller may rewrite the readers of `node` and everything after them, and add parameters.
    """

    def __init__(self, graph: fx.GraphModule, tokens: Tensor) -> None:
        """Stand before the first node, with tokens int64 [N, S]."""
        self._graph, self._place, self._home = graph, place_of(graph), tokens.device
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
        shared: dict[fx.Node, Any] = {}
        for window in self._windows:
            window.update({n: _moved(value, self._place.device) for n, value in window.items()})
            with torch.no_grad():
                value_of = partial(self._value, window, shared)
                for step in steps:
                    window[step] = call(step, value_of, None, self._place.device)
                    for value in dead[step]:
                        window.pop(value, None)
                value = value_of(node)
            for stale in window.keys() - frontier:  # the node itself, or what a rewrite stopped reading
                del window[stale]
            window.update({n: _moved(kept, self._home) for n, kept in window.items()})
            yield value
        self._reached = node

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


def _moved(value: Any, device: torch.device) -> Any:
    return fx.node.map_aggregate(value, lambda v: v.to(device) if isinstance(v, Tensor) else v)
