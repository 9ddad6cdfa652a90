"""Nibbles: two to a byte, as the formulas of the runtimes' documents have them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rolora_passes.export.onnx.weights import KernelWeight, blocks, pack_signed
from rolora_passes.numerics import packing
from rolora_passes.numerics.packing import pack_nibbles


def integers(shape: list[int], bits: int = 4, seed: int = 0) -> Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def packed(values: Tensor, high_first: bool) -> Tensor:
    """Byte by byte."""
    nibbles = F.pad(values, (0, values.shape[-1] % 2)).to(torch.int64) % 16
    first, second = nibbles[..., ::2], nibbles[..., 1::2]
    return (16 * first + second if high_first else first + 16 * second).to(torch.uint8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_pairs_of_any_shape(shape: list[int], high_first: bool, unsigned: bool, seed: int) -> None:
    values = integers(shape, seed=seed)
    values = values + 8 if unsigned else values
    copy = values.clone()
    given_ = values.view(torch.uint8) if unsigned else values
    assert torch.equal(pack_nibbles(given_, high_first), packed(values, high_first))
    assert torch.equal(values, copy)


def test_strides_and_odd_offsets() -> None:
    values = integers([9, 16])
    for part in (
        values.t(),
        values[:, 1:],
        integers([5, 3])[1:2, :2],
        values[1:, 3:9],
        values.flatten()[1:21],
        values[:, ::2],
    ):
        assert torch.equal(pack_nibbles(part), packed(part, False))


def test_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = integers([7, 30])
    expected = packed(values, False)
    monkeypatch.setattr(packing, "_BLOCK", 16)
    assert torch.equal(pack_nibbles(values), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "block", "repeat"), [(64, 32, 1), (40, 16, 3), (96, 16, 2), (48, 16, 3)])
def test_blocks_of_onnx(bits: int, width: int, block: int, repeat: int) -> None:
    """Shifted by half their range in wider integers, filled up with zeros, low bits first."""
    count, half = -(-width // block), 1 << (bits - 1)
    weight = integers([5, width], bits)
    zero = integers([5, -(-count // repeat)], bits, 1)
    known = KernelWeight("w", weight, torch.rand(zero.shape), zero, bits)
    found, scale, zeros = blocks(known, block, repeat)
    shifted = (F.pad(weight, (0, count * block - width)).int() + half).to(torch.uint8).view(5, count, block)
    points = (zero.int() + half).to(torch.uint8).repeat_interleave(repeat, 1)
    assert zeros is not None and torch.equal(scale, known.scale.repeat_interleave(repeat, 1))
    assert torch.equal(found, packed(shifted, False) if bits == 4 else shifted)
    assert torch.equal(zeros, packed(points, False) if bits == 4 else points)


def test_onnx_int4() -> None:
    for shape in ([3, 5], [4, 6], [1]):
        values = integers(shape)
        assert torch.equal(pack_signed(values), packed(values.flatten(), False))
