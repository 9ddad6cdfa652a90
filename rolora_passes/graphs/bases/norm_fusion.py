"""Which gains, biases and centrings of norms can move into parameters, and where moving them is of use.

A norm is followed by y = norm(x) * gain + bias. The gain and the bias can move into what reads y, LayerNorm's
centring into what writes x. That is of use where it leaves the basis class of x free: a gain between x and
its readers pins the axis, and without one the whole class can rotate. Where something else pins the axis
too (a gain after a sublayer), moving the others frees nothing, and a weight that holds gains of very
different sizes is harder to quantize than the same weight without them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import fx

from rolora_passes.graphs.bases.inference import Bases, BasisClass, Group, infer_bases
from rolora_passes.graphs.graph import (
    add_parameter,
    constants,
    copy_graph,
    get_tensor,
    is_op,
    leaves,
    root_names,
)
from rolora_passes.graphs.shapes import infer_shapes

_NO_USE = "moving it frees no rotation"


@dataclass(frozen=True)
class Affine:
    """What follows a norm: `gain` is the multiplication, `bias` the addition after it; one may be absent."""

    norm: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None

    @property
    def result(self) -> fx.Node:
        """The value that everything else reads."""
        found = self.bias or self.gain
        assert found is not None
        return found

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for node in (self.gain, self.bias) if node is not None]


@dataclass
class Fusions:
    """What a graph's norms allow.

    Attributes:
        affines: those that can move, and whose moving frees a class.
        centrings: LayerNorms whose centring can move, likewise.
        left: names of the others (the gain's, else the bias's parameter, or the norm), each with the reason.
        bases: the graph's, looking past all that can move.
    """

    bases: Bases

    affines: list[Affine] = field(default_factory=list)
    centrings: list[fx.Node] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


def find_fusions(graph: fx.GraphModule) -> Fusions:
    """Decide for every norm of a graph whose embedding and head have tables of their own.

    All that could move is looked past first, to see which can. Then what cannot move is put back, and what
    would free no class, until only moves are left that free one together.
    """
    known = constants(graph)
    affines = find_affines(graph, known)
    norms = [n for n in graph.graph.nodes if is_op(n, "layer_norm")]
    everything = {*norms, *(n for a in affines for n in a.nodes)}
    bases = infer_bases(graph, cut=everything)
    reasons: dict[Affine | fx.Node, str | None] = {a: _why_not(a, affines, bases, known) for a in affines}
    reasons |= {n: blocked(bases.of(n.args[0]), reading=False) for n in norms}
    cut: set[fx.Node] | None = None
    while cut != (left := _of([one for one, reason in reasons.items() if reason is None])):
        # As if what cannot move, or is of no use, stayed.
        cut, bases = left, bases if left == everything else infer_bases(graph, cut=left)
        reasons |= {one: _why_useless(one, bases, cut) for one, why in reasons.items() if why is None}
    result = Fusions(bases)
    for one, reason in reasons.items():
        if reason is not None:
            name = parameter_name(one, known) if isinstance(one, Affine) else one.name
            result.left.append((name, reason))
        elif isinstance(one, Affine):
            result.affines.append(one)
        else:
            result.centrings.append(one)
    return result


def _of(moving: Iterable[Affine | fx.Node]) -> set[fx.Node]:
    """The nodes that would go."""
    return {node for one in moving for node in (one.nodes if isinstance(one, Affine) else [one])}


def find_untied_fusions(graph: fx.GraphModule) -> tuple[Fusions, set[str]]:
    """The same of any graph, as if embedding and head had tables of their own; and the tables that must.

    The nodes are those of a copy of the graph; no tensor is copied.
    """
    graph = copy_graph(graph)
    names: dict[fx.Node, str] = {}
    for table, readers in tied_tables(graph).items():
        name = root_names(table)[0]
        clone = add_parameter(graph, name, get_tensor(graph, name))
        names |= {table: name, clone: name}
        for reader in readers:
            reader.replace_input_with(table, clone)
    fusions = find_fusions(graph)
    touched = [a.result for a in fusions.affines] + [n.args[0] for n in fusions.centrings]
    axes = [axis for node in touched for cls, _ in fusions.bases.of(node) for axis in cls.parameters]
    return fusions, {names[axis.node] for axis in axes if axis.node in names}


def tied_tables(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Tables that an embedding reads and linears too, as their weight: with those linears."""
    tied = {}
    for table in leaves(graph):
        readers = [u for u in table.users if is_op(u, "linear") and u.args[1] is table]
        if readers and any(is_op(u, "embedding") for u in table.users):
            tied[table] = readers
    return tied


def find_affines(graph: fx.GraphModule, known: Collection[fx.Node]) -> list[Affine]:
    """Every gain and bias [d] that follows a norm, in graph order."""
    shapes = infer_shapes(graph, only=known)

    def reads(node: fx.Node, value: fx.Node, kind: str) -> bool:
        others = [a for a in node.all_input_nodes if a is not value]
        return is_op(node, kind) and len(others) == 1 and others[0] in known and shapes[others[0]].dim() == 1

    found = []
    for norm in graph.graph.nodes:
        if not is_op(norm, "rms_norm", "layer_norm"):
            continue
        for gain in [u for u in norm.users if reads(u, norm, "mul")]:
            biases = [u for u in gain.users if reads(u, gain, "add")]
            found.append(Affine(norm, gain, biases[0] if len(biases) == len(gain.users) == 1 else None))
        found += [Affine(norm, None, u) for u in norm.users if reads(u, norm, "add")]
    return found


def operand(node: fx.Node, known: Collection[fx.Node]) -> fx.Node:
    """The constant that a gain multiplies by, or a bias adds."""
    return next(a for a in node.all_input_nodes if a in known)


def parameter_name(affine: Affine, known: Collection[fx.Node]) -> str:
    """The parameter that an affine is called after: its gain's, or its bias's if it has no gain."""
    return root_names(operand(affine.nodes[0], known))[0]


def blocked(factors: list[tuple[BasisClass, bool]], reading: bool) -> str | None:
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


def _why_not(affine: Affine, affines: list[Affine], bases: Bases, known: Collection[fx.Node]) -> str | None:
    """Why an affine cannot move into what reads it."""
    result = affine.result
    if affine.bias is not None:
        for user in result.users:
            if not (is_op(user, "linear") and user.args[0] is result and user.args[1] in known):
                return f"{user.name} reads the norm's output and is not a linear"
    factors = bases.of(result)
    reason = blocked(factors, reading=True)
    sharing = [a for a in affines if bases.of(a.result)[:1] == factors[:1]]
    return reason or ("its axis meets another gain's" if len(sharing) > 1 else None)


def _why_useless(one: Affine | fx.Node, bases: Bases, cut: Collection[fx.Node]) -> str | None:
    """Why the class of what a norm reads (and of what it writes, if it is looked past) stays rigid anyway."""
    norm = one.norm if isinstance(one, Affine) else one
    read = bases.of(norm.args[0])
    for cls, _ in read + (bases.of(norm) if norm in cut else []):
        if not cls.free:
            return f"{_NO_USE}: {cls.why_rigid()}"
    return None if any(cls.parameters for cls, _ in read) else f"{_NO_USE}: no parameter writes what it reads"
