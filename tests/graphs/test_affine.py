"""Quantizers' arithmetic: torchao's, bit for bit, where torchao defines it; searches and tables by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.quantization import quant_primitives as ao

from rolora_passes.errors import PassError
from rolora_passes.numerics import affine
from rolora_passes.numerics.codebooks import absmax, decode, encode
from rolora_passes.numerics.grids import codebook

WIDTHS = st.tuples(st.integers(1, 7), st.integers(1, 5), st.sampled_from([2, 4, 32, 48]))


def weight(rows: int, groups: int, group: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups * group, generator=generator)
    return x * torch.randn(rows, 1, generator=generator).exp()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(WIDTHS, st.integers(2, 8), st.booleans(), st.integers(0, 9))
def test_equal_to_torchao(shape: tuple[int, int, int], bits: int, symmetric: bool, seed: int) -> None:
    rows, groups, group = shape
    w = weight(rows, groups, group, seed)
    first, last = affine.limits(bits, symmetric)
    kind = ao.MappingType.SYMMETRIC if symmetric else ao.MappingType.ASYMMETRIC
    # A symmetric scale is max|w| / last, torchao's for the range [-last, last].
    expected_scale, expected_zero = ao.choose_qparams_affine(
        w, kind, (1, group), torch.int8, -last if symmetric else first, last,
        eps=affine.EPSILON, scale_dtype=torch.float32, zero_point_dtype=torch.int8,
    )  # fmt: skip
    scale, zero = affine.choose_qparams(w, group, bits, symmetric)
    assert torch.equal(scale, expected_scale.reshape(scale.shape))
    assert torch.equal(zero, expected_zero.reshape(zero.shape))
    integers = affine.quantize(w, scale, zero, bits, symmetric)
    known = (w, (1, group), scale, zero, torch.int8, first, last)
    assert torch.equal(integers, ao.quantize_affine(*known))
    back = ao.dequantize_affine(integers, (1, group), scale, zero, torch.int8, first, last)
    shift = None if symmetric else zero
    assert torch.equal(affine.dequantize(integers, scale, shift), back)
    grouped = affine.round_trip(
        w.unflatten(-1, (-1, group)), scale.unsqueeze(-1), zero.unsqueeze(-1), bits, symmetric
    )
    assert torch.equal(grouped.flatten(-2), back)
    if bits > 2:
        assert torch.equal(affine.fake_quantize(w, bits, group, symmetric), back)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_multiplies_the_range(symmetric: bool) -> None:
    x = weight(6, 1, 40, 3)
    low, high = x.amin(-1, True).clamp_max(0) * 0.9, x.amax(-1, True).clamp_min(0) * 0.9
    scale, zero = affine.qparams(low, high, 4, symmetric)
    expected = affine.round_trip(x, scale, zero, 4, symmetric)
    assert torch.equal(affine.fake_quantize(x, 4, None, symmetric, 0.9), expected)


def test_gradients_pass_straight_through() -> None:
    x = weight(3, 2, 8, 0).requires_grad_()
    for rounded in (
        affine.fake_quantize(x, 4, 8, clip=0.5),
        affine.fake_quantize_static(x, torch.tensor([0.1]), torch.tensor([0]), 4),
    ):
        (gradient,) = torch.autograd.grad((rounded * torch.arange(16.0)).sum(), x)
        assert torch.equal(gradient, torch.arange(16.0).expand(3, 16))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clip_search_is_the_best_of_its_grid(bits: int, symmetric: bool) -> None:
    w = weight(5, 3, 16, 1)
    w[0, 0] = 40  # an outlier that is worth cutting

    def loss(scale: Tensor, zero: Tensor) -> Tensor:
        values = affine.dequantize(affine.quantize(w, scale, zero, bits, symmetric), scale, zero)
        return (values - w).abs().pow(2.4).unflatten(-1, (-1, 16)).sum(-1)

    groups = w.unflatten(-1, (-1, 16))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    every = [loss(*affine.qparams(low * p / 100, high * p / 100, bits, symmetric)) for p in range(21, 101)]
    found = loss(*affine.choose_qparams(w, 16, bits, symmetric, clip_search=True))
    torch.testing.assert_close(found, torch.stack(every).amin(0))
    assert (found < every[-1]).any()


def test_zeros_stay_zero() -> None:
    w = torch.zeros(2, 64)
    for symmetric in (True, False):
        for search in (True, False):
            scale, zero = affine.choose_qparams(w, 32, 4, symmetric, search)
            assert (scale > 0).all()
            integers = affine.quantize(w, scale, zero, 4, symmetric)
            assert not affine.dequantize(integers, scale, zero).any()
        assert not affine.fake_quantize(w, 4, 32, symmetric).any()


def test_bfloat16_scales() -> None:
    scale, _ = affine.choose_qparams(weight(4, 2, 32, 0), 32, 4, bfloat16=True)
    assert torch.equal(scale, scale.bfloat16().float())


def test_codebooks() -> None:
    """NF4 is bitsandbytes' table; NF2 the one LoftQ's authors use; uniform ones have no zero."""
    nf4 = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(codebook("nf", 4), torch.tensor(nf4), rtol=0, atol=1e-6)
    torch.testing.assert_close(codebook("nf", 2), torch.tensor([-1, 0, 0.3379, 1]), rtol=0, atol=1e-4)
    for bits in range(2, 9):
        for kind in ("nf", "uniform"):
            table = codebook(kind, bits)
            assert len(table) == 2**bits and table[0] == -1 and table[-1] == 1 and (table.diff() > 0).all()
        assert 0 in codebook("nf", bits) and 0 not in codebook("uniform", bits)
    with pytest.raises(PassError, match="expected the name of a grid, found 'fp'; there are int, nf"):
        codebook("fp", 4)
    with pytest.raises(PassError, match="expected a grid 'nf' of 2 to 8 bits, found 9"):
        codebook("nf", 9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(WIDTHS, st.integers(2, 5), st.sampled_from(["nf", "uniform"]))
def test_codes_are_the_nearest(shape: tuple[int, int, int], bits: int, kind: str) -> None:
    rows, groups, group = shape
    w, table = weight(rows, groups, group, 4), codebook(kind, bits)
    scale = absmax(w, group)
    codes = encode(w, scale, table)
    relative = w.unflatten(-1, (-1, group)) / scale.unsqueeze(-1)
    distance = (relative.unsqueeze(-1) - table).abs()
    chosen = distance.gather(-1, codes.long().unflatten(-1, (-1, group)).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=0, atol=1e-6)
    expected = (table[codes.long()].unflatten(-1, (-1, group)) * scale.unsqueeze(-1)).flatten(-2)
    assert torch.equal(decode(codes, scale, table), expected)
