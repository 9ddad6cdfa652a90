"""On CUDA `fast_hadamard_transform` computes the transform where it has the size: the same, to rounding."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from rolora_passes.graphs.verify import relative_error
from rolora_passes.numerics import cuda_hadamard, hadamard

CALLS: list[int] = []


def _dense(x: Tensor, scale: float = 1.0) -> Tensor:
    """What the kernel is documented to compute: rows times Sylvester's matrix, in float32."""
    size = x.shape[-1]
    assert size & (size - 1) == 0 and 8 <= size <= 1 << 15 and x.is_contiguous()
    CALLS.append(size)
    signs = torch.ones(1, 1)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return (x.float() @ signs * scale).to(x.dtype)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stub of the package, and tensors of the CPU that are taken for CUDA's."""
    stub = ModuleType("fast_hadamard_transform")
    stub.hadamard_transform = _dense  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", stub)
    monkeypatch.setattr(cuda_hadamard, "_KIND", "cpu")
    cuda_hadamard._kernel.cache_clear()
    CALLS.clear()
    yield
    cuda_hadamard._kernel.cache_clear()


def ours(x: Tensor, order: int, dim: int = -1) -> Tensor:
    """By our own products: the definition."""
    split = x.movedim(dim, -1).double().unflatten(-1, (-1, order))
    found = split @ hadamard.matrix(order).double() / math.sqrt(order)
    return found.flatten(-2).movedim(-1, dim).to(x.dtype)


@pytest.mark.parametrize(
    ("order", "size"), [(8, 8), (1024, 1024), (40, None), (96, 8), (768, 64), (14336, 512)]
)
def test_the_kernel_is_used_where_it_has_the_size(order: int, size: int | None) -> None:
    x = torch.randn(3, 2 * order, generator=torch.Generator().manual_seed(0))
    found = hadamard.transform(x, order)
    assert ([] if size is None else [size]) == CALLS
    assert relative_error(found, ours(x, order)) < 1e-6


def test_other_axes_and_float64_are_ours() -> None:
    x = torch.randn(64, 5)
    torch.testing.assert_close(hadamard.transform(x, 64, 0), ours(x, 64, 0))
    torch.testing.assert_close(hadamard.transform(x.T.double(), 64), ours(x.T.double(), 64))
    hadamard.transform(torch.randn(2, 64), 32, inner=2)
    assert not CALLS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 192).to(dtype)
    found, expected = hadamard.transform(x, 192), ours(x.float(), 192).to(dtype)
    assert found.dtype == dtype and CALLS
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_it_differentiates_and_is_its_own_inverse() -> None:
    x = torch.randn(4, 96, requires_grad=True)
    hadamard.transform(x, 96).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_without_the_package_the_transform_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", None)
    cuda_hadamard._kernel.cache_clear()
    x = torch.randn(3, 64)
    torch.testing.assert_close(hadamard.transform(x, 64), ours(x, 64), rtol=0, atol=1e-6)
    assert not CALLS
