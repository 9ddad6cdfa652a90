"""The safety argument: whatever basis inference calls free can be changed without changing the function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import random_graph, tokens
from torch import Tensor, fx

from rolora_passes import Rotate
from rolora_passes.graphs.bases.inference import BasisClass, Group, infer_bases
from rolora_passes.graphs.expressions import Expressions
from rolora_passes.graphs.graph import add_parameter, copy_graph, finish
from rolora_passes.graphs.running import run as logits
from rolora_passes.graphs.text import graph_text
from rolora_passes.graphs.verify import relative_error


def draw(group: Group, size: int, generator: torch.Generator) -> Tensor:
    """A matrix of a group and of no smaller one."""
    if group == Group.PERMUTATION:
        return torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    if group == Group.ORTHOGONAL:
        return q * r.diagonal().sign()
    scales = torch.rand(size, dtype=torch.float64, generator=generator) + 0.5
    other = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    return q @ torch.diag(scales) @ other


def changed_bases(graph: fx.GraphModule, classes: list[int], seed: int) -> fx.GraphModule:
    """The graph after a random change of basis of classes: R where one is written, R^-T where it is read."""
    result = copy_graph(graph)
    expressions, generator = Expressions(result), torch.Generator().manual_seed(seed)
    found = infer_bases(result).classes
    for number in classes:
        cls = found[number]
        matrix = draw(cls.group, cls.size, generator)
        both = {False: matrix, True: torch.linalg.inv(matrix).T}
        for axis in cls.parameters:
            node = add_parameter(result, "basis", both[axis.flipped])
            expressions.wrap(axis.node, torch.ops.rolora.rotate.default, node, axis.dim, axis.inner)
    return finish(result)


def classes(graph: fx.GraphModule) -> list[BasisClass]:
    return infer_bases(graph).classes


def check_classes(graph: fx.GraphModule, seed: int = 0) -> None:
    """A change of basis of every class at once keeps the output; if not, name the class and its reasons."""
    expected = logits(graph, tokens())
    admitting = [i for i, c in enumerate(classes(graph)) if c.group > Group.NONE]
    if relative_error(logits(changed_bases(graph, admitting, seed), tokens()), expected) < 1e-9:
        return
    for number in admitting:
        error = relative_error(logits(changed_bases(graph, [number], seed), tokens()), expected)
        cls = classes(graph)[number]
        where = ", ".join(map(str, cls.parameters))
        assert error < 1e-9, f"{cls.group!r} of {where} moves the output by {error:.1e}\n{graph_text(graph)}"
    pytest.fail(f"no class alone moves the output, all together do\n{graph_text(graph)}")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 24))
def test_every_class_admits_its_group_in_random_graphs(seed: int, length: int) -> None:
    check_classes(random_graph(seed, length)[0], seed % 1000)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), method=st.sampled_from(["hadamard", "orthogonal"]))
def test_rotate_keeps_the_function_of_random_graphs(seed: int, method: str) -> None:
    """The pass itself, on axes that real models have only as innermost factors."""
    graph = random_graph(seed, 12)[0]
    rotated = copy_graph(graph)
    Rotate(residual=method, heads=method, others=method).run(rotated)
    assert relative_error(logits(rotated, tokens()), logits(graph, tokens())) < 1e-9, graph_text(graph)
