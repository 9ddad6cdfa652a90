"""gptq: the integers of the textbook's loop, whatever the grid, the order and the shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rolora_passes.errors import PassError
from rolora_passes.numerics import affine
from rolora_passes.numerics import gptq as module
from rolora_passes.numerics.affine import Integers
from rolora_passes.numerics.gptq import Quantized, gptq


def layer(rows: int, width: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs of very different sizes; float64."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    x = normal(tokens or 3 * width, width) @ normal(width, width) * normal(width).exp()
    return normal(rows, width), x.t() @ x


def textbook(
    weight: Tensor, hessian: Tensor, grid: Integers, damping: float = 0.01, act_order: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal brain quantization in a fixed order: no blocks, no Cholesky, H⁻¹ by elimination.

    Returns: the rounded weight, scale, zero.
    """
    w, h = weight.clone(), hessian.clone()
    width = w.shape[1]
    group = grid.group_size or width
    seen = h.diagonal().clone()
    w[:, seen == 0] = 0
    mean = seen[seen != 0].mean()
    for i in range(width):
        h[i, i] = (seen[i] if seen[i] else mean) + damping * mean
    inverse = torch.linalg.inv(h)
    groups = list(range(width // group))
    columns = {g: list(range(g * group, (g + 1) * group)) for g in groups}
    if act_order:
        for chosen in columns.values():
            chosen.sort(key=lambda i: -float(seen[i]))
        groups.sort(key=lambda g: -float(seen[columns[g][0]]))
    scale, zero = torch.zeros(len(w), len(groups)), torch.zeros(len(w), len(groups), dtype=torch.int8)
    for g in groups:
        chosen_scale, chosen_zero = grid.choose(w[:, columns[g]])  # w as it is by now
        scale[:, g], zero[:, g] = chosen_scale[:, 0], chosen_zero[:, 0]
        for i in columns[g]:
            rounded = affine.round_trip(w[:, i], scale[:, g], zero[:, g], grid.bits, grid.symmetric)
            error = (w[:, i] - rounded) / inverse[i, i]
            w -= torch.outer(error, inverse[i])  # of column i itself, all it lost
            w[:, i] = rounded
            inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
            inverse[i, :] = inverse[:, i] = 0  # what is done moves no more, not even by a rounding error
    return w, scale, zero


def dequantized(q: Quantized) -> Tensor:
    return affine.dequantize(q.integers, q.scale, q.zero)


def loss(rounded: Tensor, weight: Tensor, hessian: Tensor) -> float:
    lost = rounded.double() - weight.double()
    return float(((lost @ hessian.double()) * lost).sum())


def nearest(weight: Tensor, grid: Integers) -> Tensor:
    scale, zero = grid.choose(weight)
    return affine.dequantize(affine.quantize(weight, scale, zero, grid.bits, grid.symmetric), scale, zero)


def check(
    weight: Tensor, hessian: Tensor, grid: Integers, damping: float = 0.01, act_order: bool = False
) -> None:
    found = gptq(weight, hessian, grid, damping, act_order)
    rounded, scale, zero = textbook(weight, hessian, grid, damping, act_order)
    first, last = affine.limits(grid.bits, grid.symmetric)
    assert found.integers.dtype == found.zero.dtype == torch.int8 and found.scale.dtype == torch.float32
    assert found.integers.shape == weight.shape
    assert found.integers.min() >= first and found.integers.max() <= last
    assert torch.equal(found.scale, scale) and torch.equal(found.zero, zero)
    torch.testing.assert_close(dequantized(found).double(), rounded, rtol=1e-6, atol=1e-6)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 5),
    group=st.sampled_from([1, 2, 8, 32]),
    per_channel=st.booleans(),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    damping=st.sampled_from([1e-4, 0.01, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_integers_are_those_of_the_textbook(
    rows: int, groups: int, group: int, per_channel: bool, bits: int, symmetric: bool, act_order: bool,
    damping: float, seed: int,
) -> None:  # fmt: skip
    weight, hessian = layer(rows, groups * group, seed)
    check(weight, hessian, Integers(bits, None if per_channel else group, symmetric), damping, act_order)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "grid",
    [
        Integers(4, 32),
        Integers(3, None, False),
        Integers(4, 48, False),
        Integers(4, 192),
        Integers(4, 64, True, True),
    ],
)
def test_layers_wider_than_a_block(grid: Integers, act_order: bool) -> None:
    weight, hessian = layer(6, 384, seed=2)
    check(weight, hessian, grid, act_order=act_order)


def test_a_width_that_is_no_multiple_of_the_block() -> None:
    check(*layer(5, 131, seed=3), Integers(4, None, False))


@pytest.mark.parametrize("grid", [Integers(4, 32), Integers(4, None, False), Integers(2, 64, False)])
@pytest.mark.parametrize("act_order", [False, True])
def test_float32_subtracts_to_the_bit_what_dequantizing_gives(
    grid: Integers, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = layer(16, 192, seed=4)
    exact = gptq(weight, hessian, grid, act_order=act_order)
    blocks = []
    whole = affine.quantize

    def spy(rounded: Tensor, scale: Tensor, zero: Tensor, *rest: int) -> Tensor:
        integers = whole(rounded, scale, zero, *rest)
        assert torch.equal(affine.dequantize(integers, scale, zero), rounded)
        blocks.append(integers)
        return integers

    monkeypatch.setattr(module.affine, "quantize", spy)
    found = gptq(weight.float(), hessian.float(), grid, act_order=act_order)
    assert torch.equal(found.integers.sort(1)[0], torch.cat(blocks, 1).sort(1)[0])  # but for the order
    assert (found.integers != exact.integers).double().mean() < 0.02


@pytest.mark.parametrize(
    "grid", [Integers(4, 32), Integers(4, None), Integers(3, 32, False), Integers(4, 32, True, True)]
)
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_change_less_than_by_rounding_to_nearest(grid: Integers, act_order: bool) -> None:
    weight, hessian = layer(24, 160, seed=5)
    found = dequantized(gptq(weight.float(), hessian.float(), grid, act_order=act_order))
    assert loss(found, weight, hessian) < 0.7 * loss(nearest(weight, grid), weight, hessian)


def test_without_correlations_it_is_rounding_to_nearest() -> None:
    weight, _ = layer(8, 64)
    for act_order in (False, True):
        found = gptq(weight, torch.rand(64).double().diag(), Integers(4, 32), act_order=act_order)
        assert torch.equal(dequantized(found), nearest(weight, Integers(4, 32)))


def test_the_order_shows_in_nothing_but_the_values() -> None:
    weight, hessian = layer(8, 96, seed=6)
    for grid in (Integers(8, 32), Integers(8, None)):
        found = dequantized(gptq(weight, hessian, grid, act_order=True))
        assert (found - weight).norm() < 0.1 * weight.norm()  # of permuted integers it is about 1.4
        assert not torch.equal(found, dequantized(gptq(weight, hessian, grid)))


def test_scales_of_groups_come_from_what_is_left_of_the_weight() -> None:
    weight, hessian = layer(8, 128, seed=7)  # one block: every group but the first
    grid = Integers(3, 32)
    scale = gptq(weight, hessian, grid).scale
    of_the_original = grid.choose(weight)[0]
    assert torch.equal(scale[:, 0], of_the_original[:, 0])
    assert (scale[:, 1:] != of_the_original[:, 1:]).double().mean() > 0.9


def test_stacked_rows_are_rounded_as_if_alone() -> None:
    weight, hessian = layer(30, 64, seed=8)
    for grid in (Integers(4, 32), Integers(4, None, False)):
        whole = gptq(weight, hessian, grid)
        for rows in (slice(0, 7), slice(7, 30)):
            part = gptq(weight[rows], hessian, grid)
            assert torch.equal(part.integers, whole.integers[rows])
            assert torch.equal(part.scale, whole.scale[rows]) and torch.equal(part.zero, whole.zero[rows])


@pytest.mark.parametrize("act_order", [False, True])
def test_a_dead_channel_is_zero_and_costs_nothing(act_order: bool) -> None:
    weight, hessian = layer(6, 64, seed=9)
    dead = [0, 17, 40]
    weight[:, dead] = 100  # would spoil the scale of its group, or of the channel
    hessian[dead] = hessian[:, dead] = 0
    for grid in (Integers(4, 32), Integers(4, None, False)):
        found = dequantized(gptq(weight, hessian, grid, act_order=act_order))
        assert not found[:, dead].any()
        alive = [i for i in range(64) if i not in dead]
        assert (found - weight)[:, alive].abs().max() < 2
        check(weight, hessian, grid, act_order=act_order)


def test_the_result_does_not_depend_on_the_hessians_unit() -> None:
    weight, hessian = layer(6, 64, seed=10)
    hessian[5] = hessian[:, 5] = 0
    for factor in (2.0**-40, 2.0**20):
        assert torch.equal(
            gptq(weight, hessian, Integers(4, 32)).integers,
            gptq(weight, hessian * factor, Integers(4, 32)).integers,
        )


def test_arguments_are_not_written_into() -> None:
    weight, hessian = layer(6, 64, seed=11)
    hessian[5] = hessian[:, 5] = 0
    copies = weight.clone(), hessian.clone()
    gptq(weight, hessian, Integers(4, 32))
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])


def test_a_singular_hessian_needs_damping() -> None:
    weight, hessian = layer(6, 64, seed=12, tokens=20)  # of rank 20
    for matrix in (hessian, hessian.float().double()):
        with pytest.raises(PassError, match=r"not, with damping 0.0: raise the damping or calibrate on more"):
            gptq(weight, matrix, Integers(4, 32), damping=0.0)
        found = dequantized(gptq(weight, matrix, Integers(4, 32)))
        assert loss(found, weight, hessian) < loss(nearest(weight, Integers(4, 32)), weight, hessian)
    with pytest.raises(PassError, match="expected a positive definite Hessian"):
        gptq(weight, -hessian, Integers(4, 32))


@pytest.mark.parametrize("seed", range(12))
def test_a_hessian_that_rounding_errors_alone_make_definite_is_refused(seed: int) -> None:
    weight, hessian = layer(6, 64, seed)
    hessian[9] = hessian[40]  # two channels that are always equal
    hessian[:, 9] = hessian[:, 40]
    with pytest.raises(PassError, match="raise the damping"):
        gptq(weight, hessian, Integers(4, 32), damping=0.0)


def test_errors() -> None:
    weight, hessian = layer(6, 64)
    for bad in (float("nan"), float("inf")):
        broken = hessian.clone()
        broken[3, 4] = bad
        with pytest.raises(PassError, match="expected a finite Hessian, found NaN or infinite entries"):
            gptq(weight, broken, Integers(4, 32))
    with pytest.raises(PassError, match=r"found a weight \[6, 64\] and a Hessian \[32, 32\]"):
        gptq(weight, hessian[:32, :32], Integers(4, 32))
    with pytest.raises(PassError, match=r"expected a weight \[out, in\]"):
        gptq(weight[0], hessian, Integers(4, 32))
    with pytest.raises(PassError, match="groups of 48 do not divide an input of 64"):
        gptq(weight, hessian, Integers(4, 48))
    with pytest.raises(PassError, match="found zeros: nothing reached this input"):
        gptq(weight, hessian * 0, Integers(4, 32))
