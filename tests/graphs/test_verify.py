"""Verification sees small errors in every type, and takes rounding for what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import captured
from torch import Tensor, fx

from rolora_passes import FoldConstants, FuseNorm, Pass, Report, Rotate, apply_passes, history
from rolora_passes.errors import VerificationError
from rolora_passes.graphs.graph import add_parameter, copy_graph, is_op, parameters, set_tensor

EVERY = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORM, PROJECTION = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Change(Pass):
    """Replaces a parameter, and calls that exact."""

    parameter: str = ""
    change: Callable[[Tensor], Tensor] = torch.clone

    def run(self, graph: fx.GraphModule) -> Report:
        set_tensor(graph, self.parameter, self.change(parameters(graph)[self.parameter]))
        return Report(changed=[self.parameter])


def near_one(dtype: torch.dtype) -> fx.GraphModule:
    """A llama whose gains are 1 ± 0.05."""
    graph = copy_graph(captured("llama", dtype))
    generator = torch.Generator().manual_seed(0)
    for name, value in parameters(graph).items():
        if name.endswith("norm.weight"):
            gain = 1 + 0.05 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            set_tensor(graph, name, gain.to(dtype))
    return graph


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(
    ("name", "change"),
    [(NORM, torch.ones_like), (PROJECTION, lambda w: w * 1.01), (PROJECTION, lambda w: w.roll(1, 0))],
    ids=["a gain dropped", "a weight scaled by 1 %", "rows moved"],
)
def test_planted_errors_are_refused(
    name: str, change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    with pytest.raises(VerificationError, match=r"change promises to keep the function.*The first value"):
        apply_passes(near_one(dtype), [Change(name, change)])


@pytest.mark.parametrize("dtype", EVERY)
def test_a_dropped_bias_is_refused(dtype: torch.dtype) -> None:
    bias = "model.layers.0.self_attn.v_proj.bias"
    with pytest.raises(VerificationError, match="promises"):
        apply_passes(captured("llama-tied", dtype), [Change(bias, torch.zeros_like)])


@pytest.mark.parametrize("dtype", EVERY[1:])
def test_an_error_beside_rounding_is_refused(dtype: torch.dtype) -> None:
    """Every weight is rounded, and one gain of the last layer's has been lost on the way."""

    @dataclass(frozen=True)
    class Forgetful(FoldConstants):
        def run(self, graph: fx.GraphModule) -> Report:
            scaled = next(n for n in graph.graph.nodes if is_op(n, "mul") and "up_proj" in str(n.args[0]))
            scaled.replace_all_uses_with(scaled.args[0])
            return super().run(graph)

    graph = apply_passes(captured("llama", dtype), [FuseNorm(), Rotate()])
    rounded = history(apply_passes(graph, [FoldConstants()]))[-1].error
    assert rounded is not None and rounded < 8 * torch.finfo(dtype).eps
    with pytest.raises(VerificationError, match="forgetful promises"):
        apply_passes(graph, [Forgetful()])


def test_types_that_do_not_fit_are_named() -> None:
    @dataclass(frozen=True)
    class Widen(Pass):
        def run(self, graph: fx.GraphModule) -> Report:
            linear = next(n for n in graph.graph.nodes if is_op(n, "linear"))
            wide = add_parameter(graph, "wide", parameters(graph)[linear.args[1].target].float())
            linear.update_arg(1, wide)
            return Report(changed=["wide"])

    with pytest.raises(VerificationError, match=r"own types: linear \(wide\) is given .* float32"):
        apply_passes(captured("llama", torch.bfloat16), [Widen()])


def test_what_rounds_nothing_has_no_allowance() -> None:
    for dtype in EVERY:
        done = history(apply_passes(captured("llama", dtype), [FuseNorm(), Rotate()]))
        assert all(record.error is not None and record.error < 1e-12 for record in done)
