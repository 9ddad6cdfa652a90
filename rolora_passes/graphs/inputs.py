"""What a graph takes: the names of its inputs, and values for them where only a text is given.

There are three kinds of graph. Every input is int64; batch B and each length are dynamic.

    forward(tokens [B, S], positions [B, S])         decoder-only: positions are given, for a cache to place
    forward(tokens [B, S])                           encoder-only: positions are counted in the graph
    forward(tokens [B, S], decoder_tokens [B, T])    encoder-decoder: the same, on both sides

AddKVCache makes forward(tokens [1, S], input_pos [1]) of the first, which its runtime alone drives. Rows are
unpadded: no graph has a padding mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from rolora_passes.errors import GraphFormatError
from rolora_passes.graphs.devices import place_of

DECODER = ("tokens", "positions")
ENCODER = ("tokens",)
ENCODER_DECODER = ("tokens", "decoder_tokens")
CACHED = ("tokens", "input_pos")

# Sizes for batch and sequences that no axis of a model has, so that a reshape's factors are unmistakable.
BATCH, SEQUENCE, DECODER_SEQUENCE = 1009, 2017, 3001


def positions_like(tokens: Tensor) -> Tensor:
    """Positions 0, 1, 2, … for tokens [B, S]."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)


def second_half(tokens: Tensor) -> Tensor:
    """Something for a decoder to read beside tokens [B, S]: the later half of them, one at least."""
    return tokens[:, tokens.shape[1] // 2 :]


_FROM_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda tokens: tokens,
    "positions": positions_like,
    "decoder_tokens": second_half,
}


def input_names(graph: fx.GraphModule) -> tuple[str, ...]:
    """The names of a graph's inputs, in order."""
    return tuple(node.name for node in graph.graph.nodes if node.op == "placeholder")


def require_decoder(graph: fx.GraphModule, what: str) -> None:
    """Refuse a graph that is not decoder-only where `what` needs one.

    Raises:
        GraphFormatError: says what the graph takes.
    """
    if input_names(graph) != DECODER:
        raise GraphFormatError(
            f"{what} needs a decoder-only graph, forward(tokens, positions), "
            f"found forward({', '.join(input_names(graph))})"
        )


def inputs_for(
    graph: fx.GraphModule, tokens: Tensor, decoder_tokens: Tensor | None = None
) -> dict[str, Tensor]:
    """A value for every input of a graph, by name, in the order it takes them, where it is computed.

    Args:
        tokens: int64 [B, S].
        decoder_tokens: int64 [B, T], for a graph that takes them; the later half of tokens if not given,
            which depends on the row alone, so that a batch and its rows give the same.

    Raises:
        GraphFormatError: the graph takes something else (say, the places of a cache).
    """
    names, device = require_known(graph), place_of(graph).device
    tokens = tokens.to(device)
    given = {} if decoder_tokens is None else {"decoder_tokens": decoder_tokens.to(device)}
    return {name: given[name] if name in given else _FROM_TOKENS[name](tokens) for name in names}


def require_known(graph: fx.GraphModule) -> tuple[str, ...]:
    """The names of a graph's inputs, where each can be made of tokens.

    Raises:
        GraphFormatError: the graph takes something else (say, the places of a cache).
    """
    names = input_names(graph)
    if not {*names} <= _FROM_TOKENS.keys():
        raise GraphFormatError(
            f"expected a graph that takes {', '.join(_FROM_TOKENS)} or some of these, found inputs "
            f"{', '.join(names)}; one with a cache runs in its runtime: use the graph from before"
        )
    return names
