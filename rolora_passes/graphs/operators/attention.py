"""Attention and rotary embedding, one node each.

Layouts are the ones that need no transposition around attention: [batch, sequence, heads, head_dim]. Both
compute in float32 at least, and return the type of their first operand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from rolora_passes.graphs.bases.variables import Group, limit, tag, unify
from rolora_passes.graphs.nodes import argument
from rolora_passes.graphs.operators.places import Mixes, Place, Places
from rolora_passes.graphs.operators.record import Call, Operator, Scope, Trait, Words


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


def _wide(x: Tensor) -> Tensor:
    """x in float32, if its type is narrower: no node where there is nothing to cast."""
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x


def _like(x: Tensor, other: Tensor) -> Tensor:
    return x if x.dtype == other.dtype else x.to(other.dtype)


# Bases.


def _attention(s: Scope, node: Call) -> Any:
    q, k, v = (s.of(a) for a in node.args[:3])
    for axes in (q, k, v):
        for axis in axes[:3]:
            limit(axis, Group.NONE, node, "gives every head and position its own softmax")
    unify(q[3], k[3], node, flip=True)
    tag(q[3], "query")
    tag(v[3], "value")
    return [*q[:3], v[3]]


def _rotary(s: Scope, node: Call) -> Any:
    x = s.of(node.args[0])
    limit(x[3], Group.NONE, node, "turns pairs of channels by the position")
    for axis in (*x[:2], *(a for t in node.args[1:3] for a in s.of(t))):
        limit(axis, Group.NONE, node, "turns pairs of channels by the position")
    return list(x)


# Positions.


def _attends(i: Places, node: fx.Node) -> Place | None:
    if any(i.place(argument(node, name)) != Place(1, 1, 1) for name in ("query", "key", "value")):
        raise Mixes("it attends to something else than the tokens of the sequence")
    return Place(1, 1, 1)


def _turned(i: Places, node: fx.Node) -> Place | None:
    x, *tables = (i.place(argument(node, name)) for name in ("x", "cos", "sin"))
    if x != Place(1, 1, 1) or any(t not in (x, None) for t in tables):
        raise Mixes("its angles run along another axis than its heads")
    return x


# Words.


def _attention_words(words: Words, node: Call) -> str:
    query, key, value = (words.shape(a) for a in node.args[:3])
    heads = f"{query[2]} heads x {query[3]}"
    if key[2:] != query[2:] or value[2:] != query[2:]:
        width = f"{key[3]}" if key[3] == value[3] else f"{key[3]}, {value[3]}"
        heads += f", keys and values {key[2]} x {width}"
    known: dict[str, Any] = {name: argument(node, name) for name in ("window", "softcap", "scale")}
    extra = [f"{name} {value:.6g}" for name, value in known.items() if value is not None]
    return ", ".join([f"attention {heads}", "causal" if argument(node, "causal") else "not causal", *extra])


def _rotary_words(words: Words, node: Call) -> str:
    width, turned = words.size(node.args[0]), words.size(node.args[1])
    return "rotary_embedding" + (f" of {turned} of {width} channels" if turned != width else "")


OPERATORS = (
    Operator(
        "rolora::attention",
        "(Tensor query, Tensor key, Tensor value, float scale, bool causal=True, int? window=None,"
        " float? softcap=None) -> Tensor",
        attention,
        result=lambda query, key, value, *_: query.new_empty(*query.shape[:-1], value.shape[-1]),
        basis=_attention,
        positions=_attends,
        words=_attention_words,
        traits=Trait.ONE_TYPE,
    ),
    Operator(
        "rolora::rotary_embedding",
        "(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
        rotary_embedding,
        result=lambda x, *_: x,
        basis=_rotary,
        positions=_turned,
        words=_rotary_words,
    ),
)
