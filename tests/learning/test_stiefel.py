"""Matrices stay orthogonal while they are trained, and get where the objective is least."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rolora_passes.numerics.stiefel import CayleySGD, Method, Variables


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def error(matrix: Tensor) -> float:
    exact = matrix.detach().double()
    return float((exact.T @ exact - torch.eye(len(exact))).abs().max())


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 48), st.integers(0, 99), st.sampled_from([0.0, 0.9]), st.sampled_from([0.05, 1.5]))
def test_cayley_sgd_stays_on_the_manifold(size: int, seed: int, momentum: float, lr: float) -> None:
    p = nn.Parameter(orthogonal(size, seed).float())
    optimizer = CayleySGD([p], lr=lr, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(120):  # beyond the retraction
        p.grad = torch.randn(size, size, generator=generator)
        optimizer.step()
    assert error(p) < 1e-5


def test_a_step_is_that_of_the_formulas() -> None:
    """In float64, with the fixed point solved exactly: Y = (1 - α/2 W)⁻¹ (1 + α/2 W) Pᵀ."""
    start, gradient = orthogonal(6, 1), torch.randn(6, 6, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    p.grad = gradient
    CayleySGD([p], lr=1e-3).step()
    velocity = -gradient.T
    half = velocity @ start - 0.5 * start.T @ (start @ velocity @ start)
    skew = half - half.T
    assert float(skew.abs().sum(0).max()) < 1e3  # so that lr is the step
    eye = torch.eye(6, dtype=torch.float64)
    exact = torch.linalg.solve(eye - 0.5e-3 * skew, (eye + 0.5e-3 * skew) @ start.T)
    torch.testing.assert_close(p.detach(), exact.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["cayley-sgd", "cayley-adam", "qr-sgd"])
def test_both_find_the_nearest_rotation(method: Method) -> None:
    """A start beside a rotation is brought to it."""
    target = orthogonal(8, 3).float()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 8, generator=generator)
    start = torch.linalg.qr(target + 0.1 * noise)[0]
    start = start * (start * target).sum(0).sign()
    variables = Variables({"R": start}, {}, method)
    optimizers = variables.optimizers({"cayley-sgd": 0.2, "cayley-adam": 0.02, "qr-sgd": 0.02}[method], 0.01)
    before = float((variables()[0] - target).detach().norm())
    for _ in range(200):
        loss = (variables()[0] - target).pow(2).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert float((variables()[0] - target).detach().norm()) < 0.02 * before
    assert variables.orthogonality_error() < 1e-5


@pytest.mark.parametrize("method", ["cayley-sgd", "cayley-adam", "qr-sgd"])
def test_variables_start_where_they_are_told(method: Method) -> None:
    matrices = {"A": orthogonal(12, 0), "B": orthogonal(3, 1)}
    scales = {"s": torch.linspace(-1, 1, 5)}
    variables = Variables(matrices, scales, method)
    assert variables.names == ["A", "B", "s"]
    for found, expected in zip(variables(), [*matrices.values(), *scales.values()], strict=True):
        torch.testing.assert_close(found.detach(), expected.float(), rtol=0, atol=2e-6)


def test_scales_move_freely() -> None:
    variables = Variables({}, {"s": torch.zeros(4)}, "cayley-sgd")
    (optimizer,) = variables.optimizers(1.0, 0.05)
    for _ in range(200):
        (variables()[0] - 0.7).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(variables()[0].detach(), torch.full((4,), 0.7), rtol=0, atol=1e-2)
