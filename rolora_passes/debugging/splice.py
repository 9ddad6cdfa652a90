"""Mixtures of two graphs of one model: some values computed as in one graph, the rest as in the other."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.debugging.pairing import layers_of, sites_of
from rolora_passes.errors import GraphFormatError
from rolora_passes.evaluation.sensitivity import compare_logits
from rolora_passes.graphs.graph import constants, op_name, parameters, set_tensor
from rolora_passes.graphs.info import info, set_info
from rolora_passes.graphs.operators import Trait, has
from rolora_passes.graphs.running import run


class Splice:
    """The values that two graphs share by name, and which of them the two define differently.

    A value's definition is its operator and everything that it reads, back to other shared values. For a
    linear that is its weight with all operations on it, and the quantizers and Hadamards on its input. Taking
    a definition from the other graph therefore takes parameters, scales and inserted nodes together. Shared
    values must be in the same basis in both graphs, as they are after two runs of one recipe.

    Attributes:
        first, second: the graphs.
        sites: the values that the two define differently, in graph order: from the name of the node to a
            readable name, which for a linear is its module.
    """

    def __init__(self, first: fx.GraphModule, second: fx.GraphModule) -> None:
        self.first, self.second = first, second
        self.shared = _shared(first, second)
        self._equal = _equal_tensors(first, second)
        numbers: dict[tuple[str, str], int] = {}
        definitions = [self._definitions(side, numbers) for side in (0, 1)]
        names = _labels(first) | _labels(second)
        self.sites = {
            name: names.get(name, name)
            for name in self.shared
            if definitions[0][name] != definitions[1][name]
        }

    def graph(self, from_second: Collection[str]) -> fx.GraphModule:
        """The first graph, with these values (node names) defined as in the second."""
        result, made = fx.GraphModule(torch.nn.Module(), fx.Graph()), dict[Any, fx.Node]()

        def copy(side: int, node: fx.Node) -> fx.Node:
            key = node.name if node.name in self.shared else (side, node.name)
            if key not in made:
                made[key] = result.graph.node_copy(node, lambda operand: copy(side, operand))
                if node.op == "get_attr":
                    made[key].target = f"{('first', 'second')[side]}.{node.target}"
                    set_tensor(result, str(made[key].target), parameters_of[side][str(node.target)])
            return made[key]

        parameters_of = [parameters(graph) for graph in (self.first, self.second)]
        for name, nodes in self.shared.items():
            side = int(name in from_second)
            copy(side, nodes[side])
        set_info(result, config=info(self.first).config)
        result.recompile()
        return result

    def definition(self, side: int, name: str) -> str:
        """A shared value's definition in graph 0 or 1: `linear(hadamard(mul_15, 40), down_proj.weight)`."""
        return self._text(self.shared[name][side], top=True)

    def tensors(self, side: int, name: str) -> dict[str, Tensor]:
        """The parameters in a graph's definition of a shared value, by name."""
        found = parameters((self.first, self.second)[side])
        private, stack = dict[str, Tensor](), list(self.shared[name][side].all_input_nodes)
        while stack:
            node = stack.pop()
            if node.op == "get_attr":
                private[str(node.target)] = found[str(node.target)]
            elif node.name not in self.shared:
                stack.extend(node.all_input_nodes)
        return private

    def _text(self, node: fx.Node, top: bool = False) -> str:
        if node.op == "get_attr":
            return str(node.target)
        if node.name in self.shared and not top:
            return node.name
        shown = fx.node.map_arg(node.args, lambda a: _Word(self._text(a)))
        return f"{op_name(node)}({', '.join(map(repr, shown))})"

    def _definitions(self, side: int, numbers: dict[tuple[str, str], int]) -> dict[str, int]:
        """A number for the definition of each shared value; equal definitions have equal numbers."""
        known: dict[fx.Node, str] = {}
        found: dict[str, int] = {}
        for node in (self.first, self.second)[side].graph.nodes:
            if node.op == "get_attr":
                known[node] = node.target if node.target in self._equal else f"{side}.{node.target}"
                continue
            operands = fx.node.map_arg((node.args, node.kwargs), lambda a: known[a])
            number = numbers.setdefault((f"{node.op} {node.target}", repr(operands)), len(numbers))
            known[node] = f"%{number}"
            if node.name in self.shared:
                found[node.name], known[node] = number, f"={node.name}"
        return found


class Losses:
    """How far the predictions of graphs are from those of a good graph, on tokens int64 [N, S].

    Attributes:
        evaluations: forward passes over all tokens so far, not counting the good graph's.
    """

    def __init__(self, good: fx.GraphModule, tokens: Tensor) -> None:
        self._expected = predictions(good, tokens)
        self._tokens = tokens
        self.evaluations = 0

    def of(self, graph: fx.GraphModule) -> tuple[float, float]:
        """(KL divergence in nats per token, growth of the mean negative log-likelihood of the next token)."""
        self.evaluations += 1
        return divergence(predictions(graph, self._tokens), self._expected, self._tokens)


def predictions(graph: fx.GraphModule, tokens: Tensor) -> list[Tensor]:
    """Logits [S, V] of each window of tokens [N, S]."""
    return [run(graph, row[None])[0] for row in tokens]


def divergence(found: list[Tensor], expected: list[Tensor], tokens: Tensor) -> tuple[float, float]:
    """What `Losses.of` returns, from logits."""
    sums = [compare_logits(*window) for window in zip(found, expected, tokens, strict=True)]
    windows, length = tokens.shape
    kl, nll = sum(s[0] for s in sums), sum(s[1] for s in sums)
    return kl / (windows * length), nll / (windows * max(length - 1, 1))


class _Word(str):
    """Text whose `repr` is the text itself."""

    def __repr__(self) -> str:
        return str(self)


def _shared(first: fx.GraphModule, second: fx.GraphModule) -> dict[str, tuple[fx.Node, fx.Node]]:
    """The values that both graphs compute, in an order possible in both, with their inputs and outputs."""
    constant = constants(first) | constants(second)
    place = {node.name: (i, node) for i, node in enumerate(second.graph.nodes) if node not in constant}
    shared, reached = dict[str, tuple[fx.Node, fx.Node]](), -1
    for node in first.graph.nodes:
        # What passes insert has names from a counter: two graphs may use one for two values.
        if node in constant or has(node, Trait.INSERTED) or node.name not in place:
            continue
        number, other = place[node.name]
        if number > reached and op_name(other) == op_name(node):
            shared[node.name], reached = (node, other), number
    ends = [n.name for n in first.graph.nodes if n.op in ("placeholder", "output")]
    if not all(name in shared for name in ends):
        raise GraphFormatError("expected two graphs of one model, found different inputs or outputs")
    return shared


def _equal_tensors(first: fx.GraphModule, second: fx.GraphModule) -> set[str]:
    """Names of parameters that are bit-identical in both graphs."""
    theirs = parameters(second)
    return {
        name
        for name, value in parameters(first).items()
        if name in theirs
        and (
            value is theirs[name] or (value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]))
        )
    }


def _labels(graph: fx.GraphModule) -> dict[str, str]:
    """Readable names of a graph's values, by node name."""
    sites = sites_of(graph)
    layers = layers_of(graph, sites)
    return {node.name: f"{node.name} of layer {number}" for node, number in layers.items()} | sites
