"""The few operators of the canonical form that ATen has no single node for.

Every one is a composite over ATen: it runs eagerly on any device, differentiates, works on meta
tensors, and stays one node under `torch.export` (which keeps functional composite custom ops).
Layouts are the ones that need no transposition around attention: [batch, sequence, heads, head_dim].
Rotary embedding and attention compute in float32 at least, and return the type of their first operand.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rolora_passes.numerics import affine, codebooks
from rolora_passes.numerics import hadamard as _hadamard

_library = torch.library.Library("rolora", "DEF")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scaled dot-product attention, grouped-query, one node.

    Args:
        query: [B, S, H, D]; head h reads key and value head h // (H / H_kv).
        key: [B, T, H_kv, D].
        value: [B, T, H_kv, D_v].
        scale: multiplies q·k.
        causal: position s sees positions <= s (by index).
        window: position s sees only positions less than `window` away: with causal the last `window`, itself
            included; else as many on both sides.
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2).

    Returns: [B, S, H, D_v].
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    s, t = q.shape[2], k.shape[2]
    if softcap is None and window is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    q, k, v = _wide(q), *(_wide(x).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal or window is not None:
        row = torch.arange(s, device=q.device)[:, None]
        column = torch.arange(t, device=q.device)[None, :]
        seen = column <= row if causal or window is None else column < row + window
        if window is not None:
            seen = seen & (column > row - window)
        scores = scores.masked_fill(~seen, float("-inf"))
    return _like(torch.softmax(scores, dim=-1) @ v, query).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """x in float32, if its type is narrower: no node where there is nothing to cast."""
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x if x.dtype == other.dtype else x.to(other.dtype)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (RoFormer, eq. 34) of the first R channels of every head.

    Args:
        x: [B, S, H, D]. Channels R..D pass unchanged (partial rotary).
        cos, sin: [B or 1, S, R], each angle given twice, in the order that pairs the channels; of x's type
            or a wider one.
        interleaved: channel 2i pairs with 2i+1; otherwise i pairs with i + R/2 (half-split).
    """
    width = cos.shape[-1]
    turned, rest = _wide(x[..., :width]), x[..., width:]
    if interleaved:
        even, odd = turned[..., 0::2], turned[..., 1::2]
        partner = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    out = _like(turned * cos.unsqueeze(-2) + partner * sin.unsqueeze(-2), x)
    return out if width == x.shape[-1] else torch.cat((out, rest), dim=-1)


def hadamard(x: Tensor, order: int, dim: int = -1, inner: int = 1) -> Tensor:
    """Multiply an axis, or one factor of it, by the orthonormal Hadamard matrix of `order`.

    Axis `dim` is read as (outer, order, inner), row-major; y[.., j, ..] = sum_i x[.., i, ..] H[i, j].
    O(n log n); see `rolora_passes.numerics.hadamard` for the orders and constructions.
    """
    return _hadamard.transform(x, order, dim, inner)


def kronecker(x: Tensor, factors: list[Tensor], dim: int = -1) -> Tensor:
    """Multiply an axis, or equal parts of it, by the Kronecker product of square matrices, slow axis first.

    What `hadamard` is with the factors of a Hadamard matrix, at the same cost, but with matrices that are
    parameters.
    """
    return _hadamard.multiply(x, factors, dim)


def rotate(x: Tensor, rotation: Tensor, dim: int = -1, inner: int = 1) -> Tensor:
    """Contract an orthogonal matrix into an axis, or one factor of it: the change of basis.

    Axis `dim` is read as (outer, n, inner); y[.., j, ..] = sum_i x[.., i, ..] R[i, j].

    Args:
        rotation: [n, n], a dense R; or [n], the signs of a randomised Hadamard R = diag(signs) H,
            applied by the fast transform (H in blocks of the largest order that divides n, where
            none of order n is known). Cast to x's dtype.
    """
    dim = dim % x.dim()
    n = rotation.shape[0]
    split = x.unflatten(dim, (x.shape[dim] // (n * inner), n, inner))
    rotation = rotation.to(x.dtype)
    if rotation.dim() == 1:
        signs = rotation.reshape([n, 1] + [1] * (x.dim() - dim - 1))
        return hadamard((split * signs).flatten(dim, dim + 2), _hadamard.largest_order(n), dim, inner)
    moved: Tensor = split.movedim(dim + 1, -1) @ rotation
    return moved.movedim(-1, dim + 1).flatten(dim, dim + 2)


def choose_qparams(
    weight: Tensor,
    group_size: int | None,
    bits: int,
    symmetric: bool = True,
    clip_search: bool = False,
    bfloat16: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales float32 and zero points int8 of a weight's groups (None: rows), [out, in / group_size] each."""
    return affine.choose_qparams(weight, group_size, bits, symmetric, clip_search, bfloat16)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool = True) -> Tensor:
    """The integers of a weight [out, in] on the grids of its groups: int8 [out, in]."""
    return affine.quantize(weight, scale, zero, bits, symmetric)


def dequantize(integers: Tensor, scale: Tensor, zero: Tensor | None = None, bits: int = 8) -> Tensor:
    """s·(q - z): int8 [out, in], scale and zero point [out, groups] -> [out, in] in the scale's type.

    `bits` is what the integers need; it is there to be read, by kernels and by who counts bytes.
    """
    return affine.dequantize(integers, scale, zero)


def absmax(weight: Tensor, group_size: int | None) -> Tensor:
    """The largest magnitude in every group of a weight: float32 [out, in / group_size]."""
    return codebooks.absmax(weight, group_size)


def encode(weight: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """The nearest entry of a table to w / s: uint8 [out, in]."""
    return codebooks.encode(weight, scale, table)


def decode(codes: Tensor, scale: Tensor, table: Tensor, bits: int = 8) -> Tensor:
    """s·table[code]: uint8 [out, in], scale [out, groups] -> [out, in] in the scale's type."""
    return codebooks.decode(codes, scale, table)


def fake_quantize(
    x: Tensor, bits: int, group_size: int | None = None, symmetric: bool = False, clip: float = 1.0
) -> Tensor:
    """x rounded to a grid that is chosen at run time, for every token or group of the last axis."""
    return affine.fake_quantize(x, bits, group_size, symmetric, clip)


def fake_quantize_static(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool = False
) -> Tensor:
    """x rounded to a grid that was chosen before: scale and zero point [1] or [channels]."""
    return affine.fake_quantize_static(x, scale, zero, bits, symmetric)


def observed(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x itself, of which calibration has seen the range [low, high]: [1], or [channels] each.

    The ranges are parameters of the graph, for quantizers and SmoothQuant to read. To basis inference
    the operator is unknown, so nothing that would make the ranges wrong moves past it.
    """
    same: Tensor = torch.ops.aten.alias.default(x)
    return same


for _function, _schema in {
    attention: "(Tensor query, Tensor key, Tensor value, float scale, bool causal=True,"
    " int? window=None, float? softcap=None) -> Tensor",
    rotary_embedding: "(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
    hadamard: "(Tensor x, int order, int dim=-1, int inner=1) -> Tensor",
    kronecker: "(Tensor x, Tensor[] factors, int dim=-1) -> Tensor",
    rotate: "(Tensor x, Tensor rotation, int dim=-1, int inner=1) -> Tensor",
    choose_qparams: "(Tensor weight, int? group_size, int bits, bool symmetric=True, bool clip_search=False,"
    " bool bfloat16=False) -> (Tensor, Tensor)",
    quantize: "(Tensor weight, Tensor scale, Tensor zero, int bits, bool symmetric=True) -> Tensor",
    dequantize: "(Tensor integers, Tensor scale, Tensor? zero=None, int bits=8) -> Tensor",
    absmax: "(Tensor weight, int? group_size) -> Tensor",
    encode: "(Tensor weight, Tensor scale, Tensor table) -> Tensor",
    decode: "(Tensor codes, Tensor scale, Tensor table, int bits=8) -> Tensor",
    fake_quantize: "(Tensor x, int bits, int? group_size=None, bool symmetric=False, float clip=1.0)"
    " -> Tensor",
    fake_quantize_static: "(Tensor x, Tensor scale, Tensor zero, int bits, bool symmetric=False) -> Tensor",
    observed: "(Tensor x, Tensor low, Tensor high) -> Tensor",
}.items():
    _library.define(_function.__name__ + _schema)
    _library.impl(_function.__name__, _function, "CompositeImplicitAutograd")
