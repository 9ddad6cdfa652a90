"""Which parameters make the model's own graph compute what a graph does.

A checkpoint holds parameters, and nothing else of a graph: it can be written if the graph is the model's own,
as it was captured, with other values. Both graphs are walked together, from their outputs. Where both read
constants there is an equation: this expression over the model's parameters has that value. What a graph lacks
is made neutral: a gain that was fused is one. What it has and the model has not is refused by its name.

    the model's graph                          the graph                    equations
    linear(mul(g, norm), slice(W, 0, 0, 32))   linear(norm, folded_q)       g = 1, W[:32] = folded_q
    mul(norm, add(w, 1))                       norm                         w + 1 = 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from rolora_passes.adapters.lora import find_branches
from rolora_passes.export.checkpoint.solving import Equation, can_undo
from rolora_passes.graphs.graph import argument, constants, is_op, op_name, root_names
from rolora_passes.graphs.inputs import input_names
from rolora_passes.graphs.operators import Trait, has

HADAMARD = "a Hadamard transform while the model runs (insert-hadamard's R4)"
QUERIES = "a Hadamard transform of queries or keys that are rounded (insert-hadamard's R3)"
BRANCH = "a low-rank branch beside a linear"
BIAS = "a bias of a linear that has none in the model"
CENTRING = "an RMS norm where the model's LayerNorm takes the mean again (fuse-norm's centring)"
ROUNDING = {
    "activation-quantizers": "a quantizer of activations (quantize-activations)",
    "cache-quantizers": "a quantizer of keys or values (quantize-kv-cache)",
}
# What does nothing, by operator: what a gain or a bias that is gone becomes.
NEUTRAL = {"mul": 1.0, "div": 1.0, "add": 0.0, "sub": 0.0}


@dataclass
class Matched:
    """What `match` found.

    Attributes:
        equations: in no order; one that was found twice stands there once.
        problems: what a checkpoint of the model cannot hold, in words, by what it is.
    """

    equations: dict[Equation, None] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)


def match(graph: fx.GraphModule, own: fx.GraphModule) -> Matched:
    """Compare a graph with the model's, as it was captured.

    Neither is changed. What is found is a proof by structure: with parameters that solve the equations, and
    without problems, the model computes what the graph does.
    """
    matcher = _Matcher(graph, own)
    if input_names(graph) != input_names(own):
        matcher.problem("other inputs than the model's", ", ".join(input_names(graph)))
    else:
        matcher.run()
    return matcher.matched


def stored(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend on parameters alone, dequantized ones among them."""
    found = constants(graph)
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and found.issuperset(inputs):
            found.add(node)
    return found


class _Matcher:
    def __init__(self, graph: fx.GraphModule, own: fx.GraphModule) -> None:
        self.graph, self.own = graph, own
        self.constant, self.own_constant = stored(graph), constants(own)
        self.branches = {branch.total: branch for branch in find_branches(graph)}
        self.matched = Matched()
        self._seen = set[tuple[fx.Node, fx.Node]]()
        self._left = list[tuple[Any, Any]]()

    def problem(self, what: str, where: str) -> None:
        self.matched.problems.setdefault(what, []).append(where)

    def run(self) -> None:
        ends = (g.graph.find_nodes(op="output")[0].args[0] for g in (self.graph, self.own))
        self._left.append((*ends,))
        while self._left:
            node, own = self._left.pop()
            if (node, own) not in self._seen:
                self._seen.add((node, own))
                self._pair(node, own)

    def _pair(self, node: fx.Node, own: fx.Node) -> None:
        if node.op == own.op == "placeholder" and node.target == own.target:
            return
        if own in self.own_constant or node in self.constant:
            self._differ(node, own)  # a constant where the other computes
        elif node in self.branches:
            linear = self.branches[node].linear
            self.problem(BRANCH, root_names(linear.args[1])[0])
            self._left.append((linear, own))
        elif added := _added(node):
            self.problem(added, _where(own))
            self._left.append((node.args[0], own))
        elif self._affine(own, self.own_constant) and not (
            self._affine(node, self.constant) and op_name(node) == op_name(own)
        ):
            value, constant = self._affine(own, self.own_constant)
            self._equation(constant, NEUTRAL[op_name(own)], own)
            self._left.append((node, value))
        elif node.target is own.target:
            self._operands(node, own)
        elif self._affine(node, self.constant):
            value, _ = self._affine(node, self.constant)
            self.problem(f"a constant that the model does not have there ({op_name(node)})", _where(own))
            self._left.append((value, own))
        else:
            self._differ(node, own)

    def _affine(self, node: Any, known: set[fx.Node]) -> Any:
        """(value, constant) of a value times, or plus, a constant; () of all else."""
        if not is_op(node, *NEUTRAL) or len(node.args) != 2 or node.kwargs:
            return ()
        first, second = node.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return ()
        if second in known and first not in known:
            return first, second
        mirrored = is_op(node, "mul", "add") and first in known and second not in known
        return (second, first) if mirrored else ()

    def _operands(self, node: fx.Node, own: fx.Node) -> None:
        """Pair the operands of two calls of one operator."""
        if is_op(own, *NEUTRAL) and self._affine(own, self.own_constant):
            (value, constant), (own_value, own_constant) = (
                self._affine(n, known) for n, known in ((node, self.constant), (own, self.own_constant))
            )
            pairs = [(value, own_value), (constant, own_constant)]
        elif is_op(own, "linear"):
            pairs = [*zip(node.args[:2], own.args[:2], strict=True), *self._biases(node, own)]
        else:
            found = _paired((node.args, node.kwargs), (own.args, own.kwargs))
            if found is None:
                self._differ(node, own)
                return
            pairs = found
        for one, other in pairs:
            if other in self.own_constant and one in self.constant:
                self._constants(one, other, own)
            else:
                self._left.append((one, other))

    def _biases(self, node: fx.Node, own: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The biases of two linears, if both have one."""
        bias, known = argument(node, "bias"), argument(own, "bias")
        if bias is not None and known is not None:
            return [(bias, known)]
        if known is not None:
            self._equation(known, 0.0, own)
        elif bias is not None:
            self.problem(BIAS, root_names(own.args[1])[0])
        return []

    def _constants(self, node: fx.Node, own: fx.Node, reader: fx.Node) -> None:
        """Equate two constants; or, where the model's cannot be undone, the parameters under the same one."""
        found = None if can_undo(own) else _leaves(node, own)
        for value, constant in [(node, own)] if found is None else found:
            self._equation(constant, value, reader)

    def _equation(self, own: fx.Node, value: fx.Node | float, reader: fx.Node) -> None:
        if len(names := root_names(own)) > 1:
            self.problem(f"a change to what the model computes of {len(names)} parameters", ", ".join(names))
            return
        self.matched.equations[Equation(own, value, reader)] = None

    def _differ(self, node: fx.Node, own: fx.Node) -> None:
        if is_op(node, "rms_norm") and is_op(own, "layer_norm"):
            self.problem(CENTRING, _where(own))
            self._left.append((node.args[0], own.args[0]))
        else:
            self.problem(f"{_what(node)} where the model has {_what(own)}", _where(own))


def _added(node: fx.Node) -> str:
    """What passes put on a value while the model runs, in words; nothing of all else."""
    if has(node, Trait.FAKE_QUANTIZES):
        return ROUNDING[quantizes(node)]
    if is_op(node, "hadamard", "kronecker"):
        return QUERIES if _serves_attention(node) else HADAMARD
    return ""


def quantizes(node: fx.Node) -> str:
    """Which of what can be left out a fake quantizer is."""
    return "cache-quantizers" if _serves_attention(node) else "activation-quantizers"


def _serves_attention(node: fx.Node) -> bool:
    """Whether attention reads a value, rounded or not."""
    readers = [*node.users]
    while readers:
        user = readers.pop()
        if is_op(user, "attention"):
            return True
        if has(user, Trait.VIEW) or has(user, Trait.FAKE_QUANTIZES):
            readers.extend(user.users)
    return False


def _paired(values: Any, others: Any) -> list[tuple[Any, Any]] | None:
    """The nodes in two arguments of equal structure, in pairs; None if anything else in them differs."""
    if isinstance(values, fx.Node) and isinstance(others, fx.Node):
        return [(values, others)]
    if isinstance(values, dict) and isinstance(others, dict):
        if values.keys() != others.keys():
            return None
        return _paired([*values.values()], [others[key] for key in values])
    if isinstance(values, (list, tuple)) and isinstance(others, (list, tuple)):
        if len(values) != len(others):
            return None
        found = [_paired(a, b) for a, b in zip(values, others, strict=True)]
        return None if None in found else [pair for pairs in found for pair in pairs or ()]
    return [] if type(values) is type(others) and values == others else None


def _leaves(node: fx.Node, own: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """The parameters under one expression of the model, and what stands there in the same one of the graph.

    None if the expressions differ above the model's parameters.
    """
    if own.op == "get_attr":
        return [(node, own)]
    if node.target is not own.target:
        return None
    operands = _paired((node.args, node.kwargs), (own.args, own.kwargs))
    found = None if operands is None else [_leaves(a, b) for a, b in operands]
    return None if found is None or None in found else [leaf for leaves in found for leaf in leaves or ()]


def _what(node: fx.Node) -> str:
    if node.op == "get_attr":
        return str(node.target)
    return node.name if node.op == "placeholder" else op_name(node)


def _where(node: fx.Node) -> str:
    """The parameter nearest to a node, by which people know the place."""
    for near in _outwards(node):
        if near.op == "get_attr":
            return str(near.target)
    return node.name


def _outwards(node: fx.Node) -> Iterator[fx.Node]:
    seen, front = {node}, [node]
    while front:
        yield from front
        around = [n for each in front for n in (*each.users, *each.all_input_nodes)]
        front = [n for n in dict.fromkeys(around) if n not in seen]
        seen |= {*front}
