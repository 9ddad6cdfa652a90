"""The few operators of the canonical form that ATen has no single node for.

Every one is a composite over ATen: it runs eagerly on any device, differentiates, works on meta
tensors, and stays one node under `torch.export` (which keeps functional composite custom ops).
Layouts are the ones that need no transposition around attention: [batch, sequence, heads, head_dim].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rolora_passes.graphs import hadamard as _hadamard

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
        window: with causal, position s sees only the last `window` positions, itself included.
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2).

    Returns: [B, S, H, D_v].
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    s, t = q.shape[2], k.shape[2]
    if softcap is None and window is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        row = torch.arange(s, device=q.device)[:, None]
        column = torch.arange(t, device=q.device)[None, :]
        seen = column <= row
        if window is not None:
            seen = seen & (column > row - window)
        scores = scores.masked_fill(~seen, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (RoFormer, eq. 34) of the first R channels of every head.

    Args:
        x: [B, S, H, D]. Channels R..D pass unchanged (partial rotary).
        cos, sin: [B or 1, S, R], each angle given twice, in the order that pairs the channels.
        interleaved: channel 2i pairs with 2i+1; otherwise i pairs with i + R/2 (half-split).
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        even, odd = turned[..., 0::2], turned[..., 1::2]
        partner = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat((-second, first), dim=-1)
    out = turned * cos.unsqueeze(-2) + partner * sin.unsqueeze(-2)
    return out if width == x.shape[-1] else torch.cat((out, rest), dim=-1)


def hadamard(x: Tensor, order: int, dim: int = -1, inner: int = 1) -> Tensor:
    """Multiply an axis, or one factor of it, by the orthonormal Hadamard matrix of `order`.

    Axis `dim` is read as (outer, order, inner), row-major; y[.., j, ..] = sum_i x[.., i, ..] H[i, j].
    O(n log n); see `rolora_passes.graphs.hadamard` for the orders and constructions.
    """
    return _hadamard.transform(x, order, dim, inner)


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


def choose_scale(weight: Tensor, group_size: int, quant_max: int, bfloat16: bool = False) -> Tensor:
    """Symmetric round-to-nearest scales: max|w| / quant_max for each row and group.

    Args:
        weight: [out, in], in a multiple of `group_size`.
        bfloat16: round the scales to bfloat16, which is what the int4 kernels hold for groups, so that
            graph and kernel agree.

    Returns: [out, in / group_size] float32, never zero.
    """
    groups: Tensor = weight.unflatten(-1, (-1, group_size)).abs().amax(-1).float() / quant_max
    scale = groups.clamp_min(torch.finfo(torch.float32).tiny * 2**20)
    return scale.bfloat16().float() if bfloat16 else scale


def quantize(weight: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Symmetric quantization of rows in groups: clamp(round(w / s), quant_min, quant_max).

    Args:
        weight: [out, in].
        scale: [out, groups]; groups divides in.

    Returns: [out, in] int8.
    """
    grouped = weight.unflatten(-1, (scale.shape[-1], -1))
    steps = torch.round(grouped / scale.to(weight.dtype).unsqueeze(-1))
    return steps.clamp(quant_min, quant_max).to(torch.int8).flatten(-2)


for _function, _schema in {
    attention: "(Tensor query, Tensor key, Tensor value, float scale, bool causal=True,"
    " int? window=None, float? softcap=None) -> Tensor",
    rotary_embedding: "(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
    hadamard: "(Tensor x, int order, int dim=-1, int inner=1) -> Tensor",
    rotate: "(Tensor x, Tensor rotation, int dim=-1, int inner=1) -> Tensor",
    choose_scale: "(Tensor weight, int group_size, int quant_max, bool bfloat16=False) -> Tensor",
    quantize: "(Tensor weight, Tensor scale, int quant_min, int quant_max) -> Tensor",
}.items():
    _library.define(_function.__name__ + _schema)
    _library.impl(_function.__name__, _function, "CompositeImplicitAutograd")
