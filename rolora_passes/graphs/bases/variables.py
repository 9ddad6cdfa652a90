"""Basis variables: a union-find over factors of axes that can split and that knows which side reads."""

from __future__ import annotations

from enum import IntEnum
from math import prod

from torch import fx


class Group(IntEnum):
    """Matrices a class of axes admits, each including those below."""

    NONE = 0  # the identity alone
    PERMUTATION = 1
    ORTHOGONAL = 2
    INVERTIBLE = 3


class Variable:
    """One factor's basis. `flip` is relative to the parent; a split variable stands for its parts."""

    def __init__(self, size: int, group: Group = Group.INVERTIBLE) -> None:
        self.size = size
        self.group = group
        self.reasons: list[tuple[fx.Node | None, str]] = []
        self.roles: set[str] = set()
        self.parent: Variable | None = None
        self.flip = False
        self.parts: tuple[Variable, Variable] | None = None


# An axis is its factors, outermost first, each with whether it is read (flipped) or written there.
Axis = list[tuple[Variable, bool]]


def find(variable: Variable) -> tuple[Variable, bool]:
    """The representative of a variable, and whether it is flipped against it."""
    flip = False
    while variable.parent is not None:
        if variable.parent.parent is not None:  # halve the path
            variable.flip ^= variable.parent.flip
            variable.parent = variable.parent.parent
        flip ^= variable.flip
        variable = variable.parent
    return variable, flip


def resolve(axis: Axis) -> Axis:
    """An axis in representatives that are not split."""
    out: Axis = []
    for variable, flipped in axis:
        root, flip = find(variable)
        if root.parts is None:
            out.append((root, flipped ^ flip))
        else:
            out.extend(resolve([(part, flipped ^ flip) for part in root.parts]))
    return out


def product(axis: Axis) -> int:
    """The number of elements along an axis."""
    return prod(v.size for v, _ in axis)


def limit(axis: Axis, group: Group, node: fx.Node | None, why: str) -> None:
    """Admit at most `group` on every factor, and remember why where that narrows it."""
    for variable, _ in resolve(axis):
        if group < variable.group:
            variable.group = group
            variable.reasons = [(node, why)]
        elif group == variable.group:
            variable.reasons.append((node, why))


def tag(axis: Axis, role: str) -> None:
    """Record what an operator calls the innermost factor of an axis."""
    factors = resolve(axis)
    if factors:
        factors[-1][0].roles.add(role)


def split(variable: Variable, outer: int) -> None:
    """Refine a representative into (outer, size / outer) wherever it stands."""
    parts = Variable(outer, variable.group), Variable(variable.size // outer, variable.group)
    for part in parts:
        part.reasons = list(variable.reasons)
    parts[1].roles = set(variable.roles)
    variable.parts = parts


def unify(first: Axis, second: Axis, node: fx.Node, flip: bool = False) -> None:
    """Make two axes share their bases, factor by factor; `flip` where one reads the other."""
    a, b = resolve(first), resolve(second)
    while a and b:
        (x, x_flip), (y, y_flip) = a[0], b[0]
        if x.size == y.size:
            _join(x, y, x_flip ^ y_flip ^ flip, node)
            a, b = resolve(a[1:]), resolve(b[1:])
        elif max(x.size, y.size) % min(x.size, y.size) == 0:
            split(*((x, y.size) if x.size > y.size else (y, x.size)))
            a, b = resolve(a), resolve(b)
        else:
            for axis in (a, b):
                limit(axis, Group.NONE, node, "meets axes whose factors do not divide each other")
            return


def _join(x: Variable, y: Variable, flip: bool, node: fx.Node) -> None:
    if x is y:
        if flip:  # written and read through one tensor: the matrix must be its own inverse transpose
            limit(
                [(x, False)], Group.ORTHOGONAL, node, "reads a basis through the tensor that also writes it"
            )
        return
    if y.group < x.group:
        x.group, x.reasons = y.group, list(y.reasons)
    elif y.group == x.group:
        x.reasons = x.reasons + y.reasons
    x.roles |= y.roles
    y.parent, y.flip = x, flip


def take(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    """Cut the outermost factors of product `size` off an axis, splitting one if need be."""
    taken: Axis = []
    rest = resolve(axis)
    while size > 1:
        if not rest:
            return None
        variable, _ = rest[0]
        if size % variable.size == 0:
            taken.append(rest[0])
            size //= variable.size
            rest = rest[1:]
        elif variable.size % size == 0:
            split(variable, size)
            rest = resolve(rest)
        else:
            return None
    return taken, rest
