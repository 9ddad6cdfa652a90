"""FuseNorm: move norm gains and biases into what reads them, LayerNorm's centring into what writes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.bases.inference import BasisClass, ParameterAxis, infer_bases
from rolora_passes.graphs.bases.norm_fusion import (
    Affine,
    Fusions,
    find_affines,
    find_fusions,
    find_untied_fusions,
    operand,
    parameter_name,
    tied_tables,
)
from rolora_passes.graphs.expressions import Expressions
from rolora_passes.graphs.graph import (
    add_parameter,
    aten,
    constants,
    finish,
    get_tensor,
    insert,
    insert_after,
    is_op,
    root_names,
    upstream,
)
from rolora_passes.graphs.lineage import keep_copy
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.passes.base import Pass, Report


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Leave only weightless RMS norms, wherever that frees a basis class.

    Before:                                         After:
        n = rms_norm(x, [d])                            n = rms_norm(x, [d])
        y = mul(n, gain)                                q = linear(n, mul(Wq, gain))
        q = linear(y, Wq)

    With LayerNorm, `n = layer_norm(x)`, `y = n * gain + bias`: the bias goes through each reader into
    its own (b + W·bias), and the centring x - mean(x) goes into every parameter that writes x.
    An RMS norm has no centring, and none is added: it would change the function.

    A gain moves when basis inference, looking past it, finds that its axis is read by parameters
    alone, and that what the norm reads can rotate once the gain is gone. Otherwise it stays, and the report
    names the operator that blocks it: gains of very different sizes make a weight hard to quantize, which is
    worth it only for a rotation.

    A table that is both embedding and head takes a gain on one side only.

    Options:
        tied: what to do with such a table: "untie" gives the head its own; "keep" puts a d x d linear,
            diag(gain), before the head instead, which rotates with the rest and saves the second V x d table
            (RMS norms only).
    """

    ensures: ClassVar[tuple[str, ...]] = ("norms fused",)
    forbids: ClassVar[tuple[str, ...]] = ("rotated", "weights quantized")

    tied: Literal["untie", "keep"] = "untie"

    def __post_init__(self) -> None:
        if self.tied not in ("untie", "keep"):
            raise PassError(f"fuse-norm: tied must be 'untie' or 'keep', found {self.tied!r}")

    def run(self, graph: fx.GraphModule) -> Report:
        report = Report()
        _free_tables(graph, self.tied, report)
        fusions = find_fusions(graph)
        report.left += fusions.left
        _move_biases(graph, fusions.affines, report)
        _move_gains(graph, fusions, report)
        _move_centring(graph, fusions.centrings, report)
        return report


def _free_tables(graph: fx.GraphModule, tied: str, report: Report) -> None:
    """Give a table that an embedding and a linear share what the linear's norm needs, if anything."""
    tables = tied_tables(graph)
    _, needed = find_untied_fusions(graph) if tables else (None, set())
    centred = any(is_op(n, "layer_norm") for n in graph.graph.nodes)
    for table, readers in tables.items():
        name = root_names(table)[0]
        if name not in needed:
            continue
        if tied == "keep" and centred:
            report.left.append(
                (name, "kept tied is for RMS norms: a LayerNorm's centring needs the head untied")
            )
        if tied == "keep" and not centred:
            known = constants(graph)
            for affine in find_affines(graph, known):
                for reader in [r for r in readers if r.args[0] is affine.gain is affine.result]:
                    _dense_before(graph, reader, affine, known)
                    report.changed.append(f"{name}: kept tied, a dense matrix before the head")
        else:
            own = _copy(graph, table, name)
            for reader in readers:
                reader.replace_input_with(table, own)
            report.changed.append(f"{name}: untied from the head")
    finish(graph)


def _copy(graph: fx.GraphModule, table: fx.Node, name: str) -> fx.Node:
    """A table of the head's own, with what passes have written about the one that it had."""
    clone = add_parameter(graph, f"{name.removesuffix('.weight')}_head.weight", get_tensor(graph, name))
    keep_copy(graph, name, str(clone.target))
    chain = upstream([table])
    made = {node: clone for node in chain if node.op == "get_attr" and node.target == name}
    for node in [n for n in graph.graph.nodes if n in chain and n not in made]:
        if any(source in made for source in node.all_input_nodes):
            with graph.graph.inserting_before(table):
                made[node] = graph.graph.node_copy(node, lambda source: made.get(source, source))
    return made[table]


def _dense_before(graph: fx.GraphModule, head: fx.Node, affine: Affine, known: Collection[fx.Node]) -> None:
    matrix = insert(graph, head, aten.diag.default, operand(affine.result, known))
    dense = insert(graph, head, aten.linear.default, affine.norm, matrix)
    head.replace_input_with(affine.result, dense)


def _move_biases(graph: fx.GraphModule, affines: list[Affine], report: Report) -> None:
    """y = n + bias read by linears: each linear's own bias becomes b + W·bias."""
    known = constants(graph)
    for affine in affines:
        if (node := affine.bias) is None:
            continue
        bias, value = operand(node, known), affine.gain or affine.norm
        for reader in list(node.users):
            own = reader.args[2] if len(reader.args) > 2 else None
            pushed = insert(graph, reader, aten.linear.default, bias, reader.args[1], own)
            reader.args = (value, reader.args[1], pushed)
        report.changed.append(root_names(bias)[0])
    finish(graph)


def _move_gains(graph: fx.GraphModule, fusions: Fusions, report: Report) -> None:
    """y = n * gain read by parameters: each takes the gain along the axis that reads y."""
    known = constants(graph)
    expressions, shapes = Expressions(graph), infer_shapes(graph, only=known)
    for affine in fusions.affines:
        if (node := affine.gain) is None:
            continue
        gain = operand(node, known)
        ((cls, _),) = fusions.bases.of(affine.result)
        for axis in cls.parameters:
            shape = [axis.size if d == axis.dim else 1 for d in range(shapes[axis.node].dim())]
            last = axis.dim == len(shape) - 1
            scale = gain if last else insert_after(graph, gain, aten.reshape.default, gain, shape)
            expressions.wrap(axis.node, aten.mul.Tensor, scale)
        node.replace_all_uses_with(affine.norm)
        report.changed.append(parameter_name(affine, known))
    finish(graph)


def _move_centring(graph: fx.GraphModule, norms: list[fx.Node], report: Report) -> None:
    """layer_norm(x) is rms_norm(x - mean(x)): write x centred, if all that is done to x is to write it."""
    if not norms:
        return
    bases = infer_bases(graph, cut=norms)
    centred: set[BasisClass] = set()
    expressions = Expressions(graph)
    for norm in norms:
        ((cls, _),) = bases.of(norm.args[0])
        if cls not in centred:
            centred.add(cls)
            _centre(graph, expressions, cls.parameters)
            report.moved |= {n.name for n, _ in cls.values}
        new = insert(graph, norm, aten.rms_norm.default, *norm.args[:2], None, norm.args[4])
        norm.replace_all_uses_with(new)
        graph.graph.erase_node(norm)
        new._rename(norm.name)
        report.changed.append(norm.name)
    finish(graph)


def _centre(graph: fx.GraphModule, expressions: Expressions, axes: list[ParameterAxis]) -> None:
    for axis in axes:
        top = expressions.top(axis.node)
        mean = insert_after(graph, top, aten.mean.dim, top, [axis.dim], True)
        expressions.wrap(axis.node, aten.sub.Tensor, mean)
