"""Orthogonal matrices that stay orthogonal while they are trained, two ways behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rolora_passes.numerics.exact import exact

Method = Literal["cayley-adam", "cayley-sgd"]
RATES: dict[Method, float] = {"cayley-adam": 2e-3, "cayley-sgd": 1.5}
_RETRACT_EVERY = 101
_EPSILON = 1e-8


class CayleySGD(torch.optim.Optimizer):
    """SGD along the Stiefel manifold by Cayley transforms (Li et al., 2020), as SpinQuant takes it.

    For a parameter P [n, n] with gradient G and momentum V: V <- μV - Gᵀ, W = Ŵ - Ŵᵀ with
    Ŵ = VP - ½Pᵀ(PVP), a step α = min(1 / ‖W‖₁, lr), P <- Yᵀ with Y = Pᵀ + (α/2) W (Pᵀ + Y), and V <- WPᵀ.
    SpinQuant takes five fixed-point steps towards Y, which leaves P up to 3e-5 from orthogonal, and mends
    that by chance (a QR decomposition once in about 101 steps). Here the equation is solved, in float64, so
    that Y is orthogonal to the rounding of P; the QR decomposition comes every 101st step, and no two runs
    differ.
    """

    def __init__(self, parameters: Any, lr: float = 1.5, momentum: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step for every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    count = state["step"] = state.get("step", 0) + 1
                    start = exact(p) if count % _RETRACT_EVERY else _retracted(exact(p))
                    velocity = group["momentum"] * state.get("velocity", torch.zeros_like(p)) - p.grad.T
                    moved, gone = _cayley_step(start, exact(velocity), group["lr"])
                    p.copy_(moved)
                    state["velocity"] = gone.to(p)


def _cayley_step(p: Tensor, velocity: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """P and V after a step."""
    product = velocity @ p
    half = product - 0.5 * p.T @ (p @ product)
    skew = half - half.T
    alpha = min(1 / (float(torch.linalg.matrix_norm(skew, 1)) + _EPSILON), lr)
    turn, eye = (alpha / 2) * skew, torch.eye(len(p), dtype=p.dtype, device=p.device)
    y = torch.linalg.solve(eye - turn, (eye + turn) @ p.T)
    return y.T, skew @ p.T


def _retracted(p: Tensor) -> Tensor:
    q, r = torch.linalg.qr(p)
    signed: Tensor = q * r.diagonal().sign()
    return signed


class Variables(nn.Module):
    """What is trained: rotations, constrained to be orthogonal, and others, free: logarithms of scales,
    branches.

    With "cayley-sgd" a rotation is a parameter that `CayleySGD` keeps on the manifold. With "cayley-adam" it
    is R₀·C(A), C the Cayley transform of a skew-symmetric matrix that starts at zero (torch's `orthogonal`
    parametrization), so that any optimiser of plain parameters, here Adam, moves along the manifold.
    """

    def __init__(self, rotations: Mapping[str, Tensor], free: Mapping[str, Tensor], method: Method) -> None:
        """Args:
        rotations: orthogonal matrices [n, n] by name.
        free: tensors of any shape by name.
        """
        super().__init__()
        self.method = method
        self.names = [*rotations, *free]
        self.rotations = nn.ModuleList(_Matrix(m) for m in rotations.values())
        self.free = nn.ParameterList(nn.Parameter(s.float().clone()) for s in free.values())
        if method == "cayley-adam":
            for matrix in self.rotations:
                parametrizations.orthogonal(matrix, orthogonal_map="cayley")

    def forward(self) -> list[Tensor]:
        """The matrices and vectors, float32, in the order of `names`."""
        matrices = [cast(Tensor, matrix.weight) for matrix in self.rotations]
        return [*matrices, *(value * 1.0 for value in self.free)]

    def optimizers(self, lr: float, free_lr: float) -> list[torch.optim.Optimizer]:
        """What moves them, at these rates."""
        matrices = list(self.rotations.parameters())
        sgd, adam = (matrices, []) if self.method == "cayley-sgd" else ([], matrices)
        groups = [{"params": adam, "lr": lr}, {"params": list(self.free), "lr": free_lr}]
        found: list[torch.optim.Optimizer] = [CayleySGD(sgd, lr)] if sgd else []
        plain = [group for group in groups if group["params"]]
        return [*found, torch.optim.Adam(plain, betas=(0.9, 0.95))] if plain else found

    def orthogonality_error(self) -> float:
        """The largest |RᵀR - 1| of any matrix, in float64."""
        with torch.no_grad():
            wide = [exact(cast(Tensor, matrix.weight)).cpu() for matrix in self.rotations]
        return max((float((m.T @ m - torch.eye(len(m))).abs().max()) for m in wide), default=0.0)


class _Matrix(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.float().clone())
