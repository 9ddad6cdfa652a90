"""A graph as one module a layer: what activation checkpointing recomputes, and what devices hold parts of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from rolora_passes.graphs.devices import device_of, place_of, written_for
from rolora_passes.graphs.graph import get_tensor, set_tensor
from rolora_passes.graphs.layers import find_layers


class LayeredGraph(nn.Module):
    """The same function as a graph, cut at its decoder layers.

    Every part holds its own weights, frozen; of the parameters named in `variables` none does: their values
    are given to every call. What does not depend on tokens (expressions on weights, rotary tables) is
    computed in every part that reads it.

    On a device that the graph's tensors travel to (`graphs.devices`) a part's weights are fetched when it is
    called. Those of a graph that does not fit must be fetched again for the gradient: recompute.

    Attributes:
        parts: before the first layer, one a layer, after the last.
        layers: those that are layers.
        device: where they are computed.
    """

    def __init__(
        self, graph: fx.GraphModule, variables: Collection[str] = (), watched: Mapping[str, str] | None = None
    ) -> None:
        """Args:
        variables: names of parameters that calls give.
        watched: names of nodes whose values calls give too, by the name to give them under.
        """
        super().__init__()
        place = place_of(graph)
        self.device, self._place = place.device, None if place.device == device_of(graph) else place
        found = find_layers(graph)
        segments = [s for s in (found.before, *found.layers, found.after) if s]
        stream = {node for segment in segments for node in segment}
        (output,) = graph.graph.find_nodes(op="output")
        self.inputs = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        self._variables, self._watched = frozenset(variables), dict(watched or {})
        self._reads: list[list[str]] = []
        self._gives: list[list[str]] = []
        self.parts = nn.ModuleList()
        for segment in segments:
            later = stream - set(segment) | {output}
            gives = [
                n
                for n in segment
                if n.name in self._watched.values() or any(user in later for user in n.users)
            ]
            part, reads = self._part(graph, segment, gives, stream)
            self.parts.append(part)
            self._reads.append(reads)
            self._gives.append([n.name for n in gives])
        first = 1 if found.before else 0
        self.layers = [*self.parts][first : first + len(found.layers)]
        self._result = cast(fx.Node, output.args[0]).name

    def forward(
        self, inputs: Mapping[str, Tensor], variables: Mapping[str, Tensor], recompute: bool = False
    ) -> dict[str, Tensor]:
        """The graph's result, as "result", and the values that are watched.

        Args:
            inputs: a value for every input of the graph, by name.
            variables: a value for every variable, by name.
            recompute: keep only what passes between layers, and compute the rest again for the gradient.
        """
        known: dict[str, Any] = {**inputs, **variables}
        for part, reads, gives in zip(self.parts, self._reads, self._gives, strict=True):
            values = [known[name] for name in reads]
            call = partial(self._call, part)
            results = checkpoint(call, *values, use_reentrant=False) if recompute else call(*values)
            known.update(zip(gives, results, strict=True))
        return {"result": known[self._result], **{k: known[name] for k, name in self._watched.items()}}

    def settle(self) -> None:
        """Move every weight to where the graph is computed, to stay there."""
        self.to(self.device)
        self._place = None

    def _call(self, part: nn.Module, *values: Any) -> Any:
        """What a part gives for values on the device. (For a gradient this is called in another thread.)"""
        if self._place is None:
            return part(*values)
        own = chain(part.named_parameters(), part.named_buffers())
        return functional_call(part, {name: self._place.fetch(tensor) for name, tensor in own}, values)

    def _part(
        self, graph: fx.GraphModule, segment: list[fx.Node], gives: list[fx.Node], stream: set[fx.Node]
    ) -> tuple[fx.GraphModule, list[str]]:
        """A module of a segment's nodes and what they need that no token changes; and the names it takes."""
        needed, edge = self._needed(segment, stream)
        part = fx.GraphModule(nn.Module(), fx.Graph())
        copies: dict[fx.Node, fx.Node] = {}
        reads: list[str] = []
        for node in graph.graph.nodes:
            if node in edge:
                copies[node] = part.graph.placeholder(node.name)
                reads.append(str(node.target) if node.op == "get_attr" else node.name)
        for node in graph.graph.nodes:
            if node in needed:
                copies[node] = part.graph.node_copy(node, copies.__getitem__)
                copies[node].kwargs = written_for(copies[node].kwargs, self.device)
                if node.op == "get_attr":
                    set_tensor(part, str(node.target), _frozen(get_tensor(graph, str(node.target))))
        part.graph.output(tuple(copies[n] for n in gives))
        part.recompile()
        return part, reads

    def _needed(self, segment: list[fx.Node], stream: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes to compute, and the values at their edge that others give."""
        needed, edge, stack = set(segment), set[fx.Node](), [a for n in segment for a in n.all_input_nodes]
        while stack:
            node = stack.pop()
            if node in needed or node in edge:
                continue
            given = node.op == "get_attr" and node.target in self._variables
            if given or node.op == "placeholder" or node in stream:
                edge.add(node)
            else:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        return needed, edge


def _frozen(value: Tensor) -> Tensor:
    """As a parameter that is not trained: what FSDP divides between devices."""
    if not value.is_floating_point():
        return value.detach()
    return torch.nn.Parameter(value.detach(), requires_grad=False)
