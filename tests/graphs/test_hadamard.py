"""Hadamard matrices are orthogonal, and the fast transform is the product with them."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rolora_passes.numerics import hadamard

# What no construction here reaches, among the multiples of 4 up to 256.
MISSING = [188, 236]
NAMED = [12, 20, 28, 36, 40, 44, 52, 60, 68, 72, 76, 84, 92, 100, 104, 108, 124, 132, 140, 148]
NAMED += [156, 164, 172, 200, 312, 924]
SAMPLED = [n for n in range(260, 1001, 4) if hadamard.constructible(n)][::10]
SMALL = [n for n in range(1, 257) if hadamard.constructible(n)]


def orthonormal(order: int) -> Tensor:
    return hadamard.matrix(order).double() / math.sqrt(order)


def dense(x: Tensor, order: int, dim: int, inner: int) -> Tensor:
    """The definition of the transform, by one einsum over axis `dim` = (outer, order, inner)."""
    dim = dim % x.dim()
    split = x.double().unflatten(dim, (-1, order, inner)).movedim(dim + 1, -1)
    return (split @ orthonormal(order)).movedim(-1, dim + 1).reshape(x.shape)


@pytest.mark.parametrize("order", sorted({*SMALL, *NAMED, *SAMPLED}))
def test_matrix_is_hadamard(order: int) -> None:
    h = hadamard.matrix(order)
    assert h.shape == (order, order) and h.dtype == torch.int8
    assert h.abs().eq(1).all()
    product = h.float() @ h.float().T  # exact: integers below 2^24
    assert torch.equal(product, order * torch.eye(order))


def test_constructible_orders() -> None:
    assert [n for n in range(4, 257, 4) if not hadamard.constructible(n)] == MISSING
    assert not any(hadamard.constructible(n) for n in (-4, 0, 3, 6, 7, 10, 14, 30, 428))
    widths = (4864, 9728, 14336, 17408, 18944, 25600, 29568)  # MLP widths of Llama 3 and Qwen
    assert all(hadamard.constructible(n) for n in widths)


@pytest.mark.parametrize(
    ("order", "constructor", "k", "m"),
    [
        (1, "sylvester", 1, 0),
        (4096, "sylvester", 1, 12),
        (40, "paley1(q=19)", 20, 1),
        (28, "paley1(q=27)", 28, 0),  # a prime power
        (36, "paley2(q=17)", 36, 0),
        (100, "paley2(q=49)", 100, 0),
        (52, "paley2(q=25)", 52, 0),
        (184, "williamson(n=23)", 92, 1),
        (172, "williamson(n=43)", 172, 0),
        (156, "goethals_seidel(t=3, n=13)", 156, 0),
        (260, "goethals_seidel(t=5, n=13)", 260, 0),
        (14336, "paley1(q=27)", 28, 9),
    ],
)
def test_describe(order: int, constructor: str, k: int, m: int) -> None:
    record = hadamard.describe(order)
    assert (record["constructor"], record["K"], record["m"], record["order"]) == (constructor, k, m, order)
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(("n", "order"), [(13696, 128), (188, 4), (14336, 14336), (1, 1), (35, 1), (6, 2)])
def test_largest_order(n: int, order: int) -> None:
    assert hadamard.largest_order(n) == order


def test_k_is_the_slow_axis() -> None:
    h12, h4 = hadamard.matrix(12), hadamard.matrix(4)
    assert torch.equal(hadamard.matrix(48), torch.kron(h12, h4))
    assert torch.equal(h4, torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]))


@given(order=st.sampled_from(SMALL), limit=st.sampled_from([2, 5, 16, 32, 64, 128]))
@settings(max_examples=60, deadline=None)
def test_factors(order: int, limit: int) -> None:
    factors = hadamard.factors(order, limit)
    assert torch.equal(functools.reduce(torch.kron, factors), hadamard.matrix(order))
    assert all(f.shape[0] <= max(limit, int(str(hadamard.describe(order)["K"]))) for f in factors)
    assert factors[0] is not hadamard.factors(order, limit)[0]  # the caller may write to them


@given(
    order=st.sampled_from(SMALL),
    outer=st.integers(1, 3),
    inner=st.integers(1, 3),
    before=st.lists(st.integers(1, 3), max_size=2),
    after=st.lists(st.integers(1, 3), max_size=2),
    from_end=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_transform_is_the_dense_product(
    order: int, outer: int, inner: int, before: list[int], after: list[int], from_end: bool
) -> None:
    x = torch.randn([*before, outer * order * inner, *after], dtype=torch.float64)
    dim = -1 - len(after) if from_end else len(before)
    original = x.clone()
    torch.testing.assert_close(hadamard.transform(x, order, dim, inner), dense(x, order, dim, inner))
    assert torch.equal(x, original)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "order", "dim", "inner"),
    [((7, 3584), 1792, 1, 1), ((5, 3584), 1792, 1, 2), ((512, 33), 512, 0, 1), ((3, 96, 40), 12, 1, 4)],
)
def test_chunks_and_dtypes(
    shape: tuple[int, ...],
    order: int,
    dim: int,
    inner: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(shape).to(dtype)
    expected = dense(x, order, dim, inner)
    for chunk in (1 << 40, 4000):
        monkeypatch.setattr(hadamard, "_CHUNK", chunk)
        y = hadamard.transform(x, order, dim, inner)
        assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
        torch.testing.assert_close(y, expected.to(dtype))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    order=st.sampled_from([1, 2, 8, 12, 32, 64, 96]),
    blocks=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 33])),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    chunk=st.sampled_from([1, 100, 5000]),
)
def test_signs_are_multiplied_in_first(
    order: int, blocks: int, sizes: tuple[int, int, int], dtype: torch.dtype, chunk: int
) -> None:
    outer, inner, right = sizes
    signs = torch.randint(0, 2, (blocks * order,)).double() * 2 - 1
    x = torch.randn(2, outer * blocks * order * inner, right).to(dtype)
    signed = x.double() * signs.repeat_interleave(inner).repeat(outer)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hadamard, "_CHUNK", chunk)
        found = hadamard.transform(x, order, 1, inner, signs)
    torch.testing.assert_close(found, dense(signed, order, 1, inner).to(dtype))
    recorded = hadamard.transform(x.requires_grad_(), order, 1, inner, signs)  # by another way
    torch.testing.assert_close(recorded, found)


@pytest.mark.parametrize("order", [1, 2, 12, 128, 256, 1536, 4864])
def test_few_factors_make_the_matrix(order: int) -> None:
    found = hadamard.few_factors(order)
    product = functools.reduce(torch.kron, found)
    torch.testing.assert_close(product, orthonormal(order), rtol=0, atol=1e-14)
    assert max(map(len, found)) <= 128
    for factor in found:
        torch.testing.assert_close(factor @ factor.T, torch.eye(len(factor), dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    parts=st.integers(1, 3),
    inner=st.integers(1, 3),
    dim=st.integers(0, 2),
    last=st.sampled_from([2, 40]),
)
def test_multiply_is_the_dense_product(sizes: list[int], parts: int, inner: int, dim: int, last: int) -> None:
    """By the Kronecker product of any matrices, of a factor of an axis anywhere, in equal parts."""
    order = math.prod(sizes)
    shape = [2, 3, last]
    shape[dim] = parts * order * inner
    x = torch.randn(shape, dtype=torch.float64)
    matrices = [torch.randn(n, n, dtype=torch.float64) for n in sizes]
    split = x.unflatten(dim, (parts, order, inner)).movedim(dim + 1, -1)
    expected = (split @ functools.reduce(torch.kron, matrices)).movedim(-1, dim + 1).reshape(shape)
    torch.testing.assert_close(hadamard.multiply(x, matrices, dim, inner), expected)


def test_strided_input() -> None:
    x = torch.randn(24, 6, dtype=torch.float64).T
    torch.testing.assert_close(hadamard.transform(x, 24), dense(x, 24, -1, 1))


def test_empty_input() -> None:
    assert hadamard.transform(torch.empty(0, 12), 12).shape == (0, 12)
    assert hadamard.transform(torch.empty(12, 0), 12, 0).shape == (12, 0)


@pytest.mark.parametrize("order", [4, 12, 48])
def test_inverse_is_the_transpose(order: int) -> None:
    x = torch.randn(3, order, dtype=torch.float64)
    torch.testing.assert_close(hadamard.transform(x, order) @ orthonormal(order).T, x)
    if order == 4:  # Sylvester matrices are symmetric
        torch.testing.assert_close(hadamard.transform(hadamard.transform(x, order), order), x)


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hadamard, "_CHUNK", 8)  # must not apply while gradients are recorded
    x = torch.randn(2, 24, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard.transform(x, 12, 1, 2), x)
    assert torch.autograd.gradgradcheck(lambda x: hadamard.transform(x, 24, 1).square(), x)
    with torch.no_grad():
        assert not hadamard.transform(x, 24, 1).requires_grad


def test_functional_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hadamard, "_CHUNK", 8)
    x, v = torch.randn(2, 5, 24, dtype=torch.float64)

    def apply(x: Tensor) -> Tensor:
        return hadamard.transform(x, 24)

    torch.testing.assert_close(torch.func.vmap(apply)(x), apply(x))
    torch.testing.assert_close(torch.func.jvp(apply, (x,), (v,)), (apply(x), apply(v)))
    torch.testing.assert_close(torch.func.vjp(apply, x)[1](v)[0], v @ orthonormal(24).T)


def test_tracing_leaves_nothing_behind() -> None:
    """First use inside a tracer, fake mode or inference mode; then the same order outside."""
    order, (x,) = 88, (torch.randn(3, 88),)
    expected = dense(x, order, -1, 1).float()
    hadamard._orthonormal.cache_clear()
    assert hadamard.transform(x.to("meta"), order).shape == x.shape
    with FakeTensorMode() as mode:
        assert hadamard.transform(mode.from_tensor(x), order).shape == x.shape
    with torch.inference_mode():
        torch.testing.assert_close(hadamard.transform(x, order), expected)
    leaf = x.clone().requires_grad_()
    hadamard.transform(leaf, order).sum().backward()  # type: ignore[no-untyped-call]
    traced = make_fx(lambda x: hadamard.transform(x, order), tracing_mode="symbolic")(x)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(hadamard.transform(x, order), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hadamard, "_CHUNK", 8)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return hadamard.transform(x, 24, dim=1)

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Model(), (torch.randn(3, 24, 5),), dynamic_shapes={"x": {0: batch}}, strict=strict
    )
    assert not any("copy_." in str(node.target) for node in program.graph.nodes)
    x = torch.randn(7, 24, 5)
    torch.testing.assert_close(program.module()(x), dense(x, 24, 1, 1).float())


def test_errors() -> None:
    x = torch.randn(4, 24)
    with pytest.raises(ValueError, match=r"no known .* order 188; the largest .* is 4$"):
        hadamard.matrix(188)
    for call in (hadamard.describe, hadamard.factors, lambda n: hadamard.transform(x, n)):
        with pytest.raises(ValueError, match="no known construction"):
            call(6)
    with pytest.raises(ValueError, match=r"order 0$"):
        hadamard.matrix(0)
    with pytest.raises(ValueError, match=r"order 16 \* inner 1 does not divide axis 1 of \[4, 24\]"):
        hadamard.transform(x, 16)
    with pytest.raises(ValueError, match="inner 3 does not divide"):
        hadamard.transform(x, 12, inner=3)
    with pytest.raises(ValueError, match="inner 0"):
        hadamard.transform(x, 12, inner=0)
    with pytest.raises(ValueError, match="floating"):
        hadamard.transform(x.int(), 12)
    with pytest.raises(IndexError):
        hadamard.transform(x, 12, dim=2)
    with pytest.raises(ValueError, match="limit"):
        hadamard.factors(24, 1)
    with pytest.raises(ValueError, match="positive"):
        hadamard.largest_order(0)
