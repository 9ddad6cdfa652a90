"""A pass that puts the package's operator into a graph."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rolora_passes import Pass, Report
from rolora_passes.graphs.graph import aten, finish, insert, insert_after, site_names


@dataclass(frozen=True)
class EvenRows(Pass):
    """Have the head read rows that are equally large.

    Before:                 After:
        y = linear(x, W)        m = amax(abs(x), [-1]) * size
                                y = scale_rows(linear(scale_rows(x, 1 / m), W), m)

    Options:
        size: of the rows; any but 0.
    """

    name: ClassVar[str] = "acme-even"
    size: float = 1.0

    def run(self, graph):
        *others, (head, name) = site_names(graph).items()
        x, scale_rows = head.args[0], torch.ops.acme.scale_rows.default
        magnitude = insert(graph, head, aten.abs.default, x)
        largest = insert(graph, head, aten.amax.default, magnitude, [-1])
        factor = insert(graph, head, aten.mul.Tensor, largest, self.size)
        inverse = insert(graph, head, aten.reciprocal.default, factor)
        head.update_arg(0, insert(graph, head, scale_rows, x, inverse))
        result = insert_after(graph, head, scale_rows, head, factor)
        head.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        finish(graph)
        left = [(other, "no head") for _, other in others]
        return Report([name], left, notes={"size": self.size})
