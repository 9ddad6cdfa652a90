"""What a legal graph is, and the facts that passes require and ensure: functions of the graph, never labels.

`require_legal` holds for every graph, at every stage; the manager runs it after each pass. A `Fact` is a
statement that a pass may rely on ("norms fused"). It holds if looking at the graph does not refute it, so it
is as true of a graph that was loaded, converted or edited by hand as of one that a pass has just made. What
cannot be seen in a folded weight is that it was rotated or scaled. Of that the graph keeps a record,
`GraphInfo.rotations`, with the matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from rolora_passes.errors import GraphFormatError, PassError
from rolora_passes.graphs.bases.norm_fusion import find_untied_fusions
from rolora_passes.graphs.bases.rotations import only
from rolora_passes.graphs.graph import argument, constants, is_op, leaves, op_name
from rolora_passes.graphs.info import info
from rolora_passes.graphs.inputs import CACHED, DECODER, ENCODER, ENCODER_DECODER, input_names
from rolora_passes.graphs.operators import Trait, has


@dataclass(frozen=True)
class Fact:
    """A statement about a graph.

    Attributes:
        name: as passes name it in `requires`, `ensures`, `forbids` and `removes`.
        refute: why it does not hold of a graph, or None if it does.
        remedy: what to do where it is required and does not hold.
    """

    name: str
    refute: Callable[[fx.GraphModule], str | None]
    remedy: str = "see `rolora passes`"


def require_legal(graph: fx.GraphModule, where: str) -> None:
    """Refuse a graph that is not what every pass may rely on.

    Its nodes are parameters, inputs that `graphs.inputs` names, and calls of functional operators; it returns
    one tensor. A graph with caches may write into them.

    Args:
        where: at which stage, for the message: "after fuse-norm".

    Raises:
        GraphFormatError: says what is wrong, all of it.
    """
    wrong = list(_illegal(graph))
    if wrong:
        some = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise GraphFormatError(f"expected a legal graph {where}: {some}")


def _illegal(graph: fx.GraphModule) -> Iterator[str]:
    names = input_names(graph)
    if names not in (DECODER, ENCODER, ENCODER_DECODER, CACHED):
        yield f"its inputs are {', '.join(names) or 'none'}"
    for node in graph.graph.nodes:
        if node.op not in ("get_attr", "placeholder", "call_function", "output"):
            yield f"`{node.name}` is a {node.op}, which no pass looks into"
        elif node.op == "call_function":
            yield from _illegal_call(node, cached=names == CACHED)
        elif node.op == "output" and not isinstance(node.args[0], fx.Node):
            yield f"it returns {node.args[0]!r:.80}, not one tensor"


def _illegal_call(node: fx.Node, cached: bool) -> Iterator[str]:
    if not isinstance(node.target, torch._ops.OpOverload):
        if getattr(node.target, "__module__", None) not in ("_operator", "math", "torch"):
            yield f"`{node.name}` calls {node.target}, which is no operator"
    elif node.target._schema.is_mutable and not cached:
        yield f"`{node.name}` writes into its operand ({node.target})"
    elif torch.Tag.nondeterministic_seeded in node.target.tags and not _draws_nothing(node):
        yield f"`{node.name}` draws random numbers ({node.target})"
    elif has(node, Trait.UNWRITTEN) and any(not has(u, Trait.BLIND) for u in node.users):
        yield f"`{node.name}` is memory that nothing has written ({node.target})"


def _draws_nothing(node: fx.Node) -> bool:
    """Dropout outside training, and attention without any."""
    if is_op(node, "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"):
        return argument(node, "train") is False
    return (is_op(node, "rrelu") and argument(node, "training") is False) or (
        is_op(node, "scaled_dot_product_attention") and not argument(node, "dropout_p")
    )


def _not_canonical(graph: fx.GraphModule) -> str | None:
    for node in graph.graph.nodes:
        if has(node, Trait.COPY):
            return f"`{node.name}` copies ({op_name(node)})"
        if is_op(node, "rms_norm", "layer_norm") and any(isinstance(a, fx.Node) for a in node.args[1:]):
            return f"`{node.name}` holds its gain"
    return next(_illegal(graph), None)


def _gains_that_would_move(graph: fx.GraphModule) -> str | None:
    fusions, _ = find_untied_fusions(graph)
    sites = [a.nodes[0].name for a in fusions.affines] + [n.name for n in fusions.centrings]
    return f"`{sites[0]}` can move into parameters" if sites else None


def _not_folded(graph: fx.GraphModule) -> str | None:
    written = [n.name for n in leaves(graph) if n.op != "get_attr"]
    return f"`{written[0]}` is computed from parameters" if written else None


def _without(
    what: str, found: Callable[[fx.GraphModule], Collection[object]]
) -> Callable[[fx.GraphModule], str | None]:
    return lambda graph: None if found(graph) else f"there is no {what}"


def _recorded(kind: str) -> Callable[[fx.GraphModule], Collection[object]]:
    """Entries of the record of rotations that are of a kind, see `rotations.only`."""
    return lambda graph: only(kind, {k: r.matrix for k, r in info(graph).rotations.items()})


def _reading(operator: str, place: slice, of: Trait) -> Callable[[fx.GraphModule], list[fx.Node]]:
    """Calls of an operator that read, at a place, what one of these makes (through views)."""

    def through(value: object) -> bool:
        while isinstance(value, fx.Node) and has(value, Trait.VIEW):
            value = value.args[0]
        return has(value, of)

    return lambda graph: [
        node for node in graph.graph.nodes if is_op(node, operator) and any(map(through, node.args[place]))
    ]


def _calls(*names: str) -> Callable[[fx.GraphModule], list[fx.Node]]:
    def found(graph: fx.GraphModule) -> list[fx.Node]:
        known = constants(graph)
        return [n for n in graph.graph.nodes if is_op(n, *names) and n not in known]

    return found


_TRANSFORMS = _calls("hadamard", "kronecker")
_WEIGHTS = _reading("linear", slice(1, 2), Trait.KEPT)
_TABLES = _reading("embedding", slice(0, 1), Trait.KEPT)
_INPUTS = _reading("linear", slice(0, 1), Trait.FAKE_QUANTIZES)
_CACHES = _reading("attention", slice(1, 3), Trait.FAKE_QUANTIZES)

FACTS: dict[str, Fact] = {
    name: Fact(name, refute, f"run {remedy} first")
    for name, refute, remedy in (
        ("canonical", _not_canonical, "rolora_passes.graphs.capture"),
        ("norms fused", _gains_that_would_move, "fuse-norm"),
        ("folded", _not_folded, "fold-constants"),
        ("rotated", _without("rotation on record", _recorded("class")), "rotate"),
        ("scalings inserted", _without("scale on record", _recorded("scale")), "insert-scaling"),
        ("hadamards inserted", _without("online transform", _TRANSFORMS), "insert-hadamard"),
        ("activations observed", _without("observer", _calls("observed")), "observe-activations"),
        ("weights quantized", _without("linear with a quantized weight", _WEIGHTS), "quantize-weights"),
        ("embedding quantized", _without("quantized table", _TABLES), "quantize-embedding"),
        ("activations quantized", _without("linear on rounded values", _INPUTS), "quantize-activations"),
        ("cache quantized", _without("attention to rounded keys or values", _CACHES), "quantize-kv-cache"),
        ("kv cache", lambda g: None if input_names(g) == CACHED else "it takes no input_pos", "add-kv-cache"),
    )
}
ROUNDED = {name for name in FACTS if name.endswith(" quantized")}
"""Facts of graphs in which something is rounded."""


def add_fact(fact: Fact) -> None:
    """Make a fact of another package's known, so that its passes can require, ensure, forbid or remove it."""
    FACTS[fact.name] = fact


def refuted(graph: fx.GraphModule, name: str) -> str | None:
    """Why a fact does not hold of a graph, or None if it does.

    Raises:
        PassError: there is no such fact.
    """
    if name not in FACTS:
        raise PassError(
            f"expected one of the facts {', '.join(FACTS)}, found {name!r}: "
            "say what it means with rolora_passes.graphs.facts.add_fact"
        )
    return FACTS[name].refute(graph)


def facts(graph: fx.GraphModule, among: Collection[str] | None = None) -> list[str]:
    """The names of the facts that hold of a graph: of those asked for, or of all."""
    return [name for name in (FACTS if among is None else among) if refuted(graph, name) is None]
