"""A tiny model whose predictions rounding changes: peaked logits, and some channels that are large."""

from __future__ import annotations

import functools

import torch
from helpers import captured, tokens_for
from torch import Tensor, fx

from rolora_passes import FuseNorm, InsertHadamard, InsertScaling, Rotate, apply_passes
from rolora_passes.graphs.graph import copy_graph, parameters, set_tensor

OPEN = [FuseNorm(), InsertScaling(), Rotate(), InsertHadamard(factors=True)]


@functools.cache
def sharp(name: str = "llama") -> fx.GraphModule:
    """float32, nothing fused."""
    graph = copy_graph(captured(name, torch.float32))
    for key, value in parameters(graph).items():
        value = value.detach().clone()
        if key.endswith(("up_proj.weight", "v_proj.weight", "fc1.weight")):
            value[::7] *= 8
        if key.endswith("lm_head.weight"):
            value *= 12
        set_tensor(graph, key, value)
    return graph


@functools.cache
def opened(name: str = "llama") -> fx.GraphModule:
    """With rotations, factors and scales that are not folded."""
    return apply_passes(sharp(name), OPEN)


def windows(count: int = 16, length: int = 24) -> Tensor:
    return tokens_for(sharp(), count, length, seed=2)
