"""Small graphs that something is wrong with, and the ones that they should be like."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from architectures import tiny_wide
from torch import Tensor, fx

from rolora_passes.debugging import with_float_twin
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import copy_graph, finish, is_op, parameters, set_tensor
from rolora_passes.passes.base import Pass
from rolora_passes.passes.manager import apply_passes
from rolora_passes.passes.registry import make_pass

ROTATED = ["fuse-norm", "rotate", {"insert-hadamard": {"r3": False}}]
QUANTIZED = [{"quantize-weights": {"bits": 8}}, "quantize-activations", "fold-constants"]
GROUPS = [{"quantize-weights": {"bits": 4, "group_size": 32}}, "fold-constants"]


def recipe(*specs: object) -> list[Pass]:
    return [make_pass(spec) for spec in specs]  # type: ignore[arg-type]


@functools.cache
def wide() -> fx.GraphModule:
    """A llama whose widths are multiples of 64, and whose weights are large enough to matter."""
    model = tiny_wide()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return capture(model)


@functools.cache
def rotated() -> fx.GraphModule:
    """Folded, in floating point."""
    return apply_passes(wide(), [*ROTATED, "fold-constants"], verify=False)


@functools.cache
def twins(groups: bool = False) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(float twin, quantized graph) in 8 bits per channel, or in groups of 4 bits."""
    return with_float_twin(wide(), recipe(*ROTATED, *(GROUPS if groups else QUANTIZED)), verify=False)


def with_tensor(graph: fx.GraphModule, name: str, change: Callable[[Tensor], object]) -> fx.GraphModule:
    """A copy with one parameter changed."""
    result, value = copy_graph(graph), parameters(graph)[name].clone()
    change(value)
    set_tensor(result, name, value)
    return result


def with_noise(graph: fx.GraphModule, part: float = 1e-4) -> fx.GraphModule:
    """A copy in which every floating-point matrix is a little off."""
    result, generator = copy_graph(graph), torch.Generator().manual_seed(1)
    for name, value in parameters(graph).items():
        if value.is_floating_point() and value.dim() == 2:
            set_tensor(result, name, value * (1 + part * torch.randn(value.shape, generator=generator)))
    return result


def without_a_hadamard(graph: fx.GraphModule, number: int) -> fx.GraphModule:
    """A copy that has lost an online Hadamard, though not its inverse in the weight."""
    result = copy_graph(graph)
    dropped = [node for node in result.graph.nodes if is_op(node, "hadamard")][number]
    dropped.replace_all_uses_with(dropped.args[0])
    return finish(result)
