"""The record of an operator."""

from rolora_passes.graphs.bases.variables import Group, limit
from rolora_passes.graphs.operators import Operator


def scale_rows(x, factors):
    """Every row of x [.., n] times a number of its own, factors [..]."""
    return x * factors.unsqueeze(-1)


def basis(scope, node):
    *rows, columns = scope.of(node.args[0])
    for axis in (*rows, *scope.of(node.args[1])):
        limit(axis, Group.NONE, node, "scales every row")
    return [*rows, columns]


def positions(places, node):
    return places.place(node.args[0])


OPERATORS = [
    Operator(
        "acme::scale_rows",
        "(Tensor x, Tensor factors) -> Tensor",
        scale_rows,
        basis=basis,
        positions=positions,
        words=lambda words, node: f"acme scale_rows of {words.size(node.args[0])}",
    )
]
