"""FuseNorm: move norm gains and biases into what reads them, LayerNorm's centring into what writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.bases import BasisClass, Group, ParameterAxis, infer_bases
from rolora_passes.graphs.graph import (
    Expressions,
    add_parameter,
    aten,
    constants,
    finish,
    get_tensor,
    insert,
    insert_after,
    is_op,
    leaves,
    root_names,
)
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.passes import Pass, Report


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Leave only weightless RMS norms, as far as the function allows.

    Before:                                         After:
        n = rms_norm(x, [d])                            n = rms_norm(x, [d])
        y = mul(n, gain)                                q = linear(n, mul(Wq, gain))
        q = linear(y, Wq)

    With LayerNorm, `n = layer_norm(x)`, `y = n * gain + bias`: the bias goes through each reader into
    its own (b + W·bias), and the centring x - mean(x) goes into every parameter that writes x.
    An RMS norm has no centring, and none is added: it would change the function.

    A gain moves when basis inference, looking past it, finds that its axis is read by parameters
    alone; otherwise it stays and the report names the operator that blocks it.

    A table that is both embedding and head takes a gain on one side only. `tied="untie"` gives the
    head its own table; `tied="keep"` puts a d x d linear, diag(gain), before the head instead, which
    rotates with the rest and saves the second V x d table (RMS norms only).
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
        for move in (_move_biases, _move_gains, _move_centring):
            move(graph, report)
            finish(graph)
        return report


def _norm_affine(graph: fx.GraphModule, kind: str) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """(node, value, parameter) for each gain ("mul") or bias ("add") that follows a norm."""
    known = constants(graph)
    shapes = infer_shapes(graph, only=known)
    found = []
    for node in graph.graph.nodes:
        if is_op(node, kind) and len(node.all_input_nodes) == 2:
            for value, parameter in (node.args[:2], node.args[1::-1]):
                if parameter in known and shapes[parameter].dim() == 1 and _is_norm(value, kind):
                    found.append((node, value, parameter))
    return found


def _is_norm(value: fx.Node, kind: str) -> bool:
    if kind == "add" and is_op(value, "mul"):
        return any(_is_norm(a, "mul") for a in value.all_input_nodes)
    return is_op(value, "rms_norm", "layer_norm")


def _free_tables(graph: fx.GraphModule, tied: str, report: Report) -> None:
    """Give a table that an embedding and a linear share what the linear's norm needs."""
    affine = {node: parameter for node, _, parameter in _norm_affine(graph, "mul")}
    for table in leaves(graph):
        readers = [u for u in table.users if is_op(u, "linear") and u.args[1] is table]
        if not readers or not any(is_op(u, "embedding") for u in table.users):
            continue
        name = root_names(table)[0]
        centred = any(is_op(n, "layer_norm") for n in graph.graph.nodes)
        if tied == "keep" and centred:
            report.left.append(
                (name, "kept tied is for RMS norms: a LayerNorm's centring needs the head untied")
            )
        if tied == "keep" and not centred:
            for reader in readers:
                if reader.args[0] in affine:
                    _dense_before(graph, reader, affine[reader.args[0]])
                    report.changed.append(f"{name}: kept tied, a dense matrix before the head")
        elif tied == "untie" or centred:
            clone = add_parameter(
                graph, f"{name.removesuffix('.weight')}_head.weight", get_tensor(graph, name)
            )
            for reader in readers:
                reader.replace_input_with(table, clone)
            report.changed.append(f"{name}: untied from the head")


def _dense_before(graph: fx.GraphModule, head: fx.Node, gain: fx.Node) -> None:
    scaled = head.args[0]
    assert isinstance(scaled, fx.Node)
    norm = next(a for a in scaled.all_input_nodes if a is not gain)
    matrix = insert(graph, head, aten.diag.default, gain)
    dense = insert(graph, head, aten.linear.default, norm, matrix)
    head.replace_input_with(scaled, dense)


def _move_biases(graph: fx.GraphModule, report: Report) -> None:
    """y = n + bias read by linears: each linear's own bias becomes b + W·bias."""
    known = constants(graph)
    for node, value, bias in _norm_affine(graph, "add"):
        name = root_names(bias)[0]
        others = [
            u for u in node.users if not (is_op(u, "linear") and u.args[0] is node and u.args[1] in known)
        ]
        if others:
            report.left.append((name, f"{others[0].name} reads the norm's output and is not a linear"))
            continue
        for reader in list(node.users):
            own = reader.args[2] if len(reader.args) > 2 else None
            pushed = insert(graph, reader, aten.linear.default, bias, reader.args[1], own)
            reader.args = (value, reader.args[1], pushed)
        report.changed.append(name)


def _move_gains(graph: fx.GraphModule, report: Report) -> None:
    gains = _norm_affine(graph, "mul")
    bases = infer_bases(graph, cut=[node for node, _, _ in gains])
    classes = [bases.of(node) for node, _, _ in gains]
    used = [c for factors in classes for c, _ in factors]
    expressions, shapes = Expressions(graph), infer_shapes(graph, only=constants(graph))
    for (node, value, gain), factors in zip(gains, classes, strict=True):
        name = root_names(gain)[0]
        reason = _blocked(factors, reading=True) or (
            used.count(factors[0][0]) > 1 and "meets another gain's axis"
        )
        if reason:
            report.left.append((name, str(reason)))
            continue
        for axis in factors[0][0].parameters:
            shape = [axis.size if d == axis.dim else 1 for d in range(shapes[axis.node].dim())]
            last = axis.dim == len(shape) - 1
            scale = gain if last else insert_after(graph, gain, aten.reshape.default, gain, shape)
            expressions.wrap(axis.node, aten.mul.Tensor, scale)
        node.replace_all_uses_with(value)
        report.changed.append(name)


def _blocked(factors: list[tuple[BasisClass, bool]], reading: bool) -> str | None:
    """Why a diagonal (reading) or a projection (writing) on this axis cannot move into its parameters."""
    if len(factors) != 1:
        return "its axis is taken apart into factors"
    cls, flipped = factors[0]
    if cls.group < Group.INVERTIBLE:
        return cls.why_rigid()
    for axis in cls.parameters:
        if (axis.flipped != flipped) != reading:
            return f"{axis} also {'writes' if reading else 'reads'} the axis"
        if axis.outer * axis.inner != 1:
            return f"{axis} holds the axis as a factor"
    if not cls.parameters:
        return "no parameter reads it" if reading else "no parameter writes it"
    return None


def _move_centring(graph: fx.GraphModule, report: Report) -> None:
    """layer_norm(x) is rms_norm(x - mean(x)): write x centred, if all that is done to x is to write it."""
    norms = [n for n in graph.graph.nodes if is_op(n, "layer_norm")]
    bases = infer_bases(graph, cut=norms)
    centred: set[BasisClass] = set()
    expressions = Expressions(graph)
    for norm in norms:
        factors = bases.of(norm.args[0])
        reason = _blocked(factors, reading=False)
        if reason:
            report.left.append((norm.name, reason))
            continue
        cls = factors[0][0]
        if cls not in centred:
            centred.add(cls)
            _centre(graph, expressions, cls.parameters)
            report.moved |= {n.name for n, _ in cls.values}
        new = insert(graph, norm, aten.rms_norm.default, *norm.args[:2], None, norm.args[4])
        norm.replace_all_uses_with(new)
        graph.graph.erase_node(norm)
        new._rename(norm.name)
        report.changed.append(norm.name)


def _centre(graph: fx.GraphModule, expressions: Expressions, axes: list[ParameterAxis]) -> None:
    for axis in axes:
        top = expressions.top(axis.node)
        mean = insert_after(graph, top, aten.mean.dim, top, [axis.dim], True)
        expressions.wrap(axis.node, aten.sub.Tensor, mean)
