"""AddKVCache: state and positions for a runtime that feeds tokens a few at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from rolora_passes.decoding.kv_cache import add_kv_cache, require_context
from rolora_passes.decoding.ready import ready
from rolora_passes.decoding.state import require_state
from rolora_passes.errors import VerificationError
from rolora_passes.graphs.buffers import written
from rolora_passes.graphs.devices import device_of
from rolora_passes.graphs.graph import get_tensor, parameters, set_tensor
from rolora_passes.graphs.info import info, set_info
from rolora_passes.graphs.inputs import require_decoder
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error, sample_tokens
from rolora_passes.passes.base import Pass, Report


@dataclass(frozen=True)
class AddKVCache(Pass):
    """Turn `forward(tokens, positions)` into `forward(tokens, input_pos)` with mutable cache buffers.

    Before:  forward(tokens [B, S], positions [B, S]) -> logits [B, S, V]
             s = attention(q, k, v, scale)
    After:   forward(tokens [1, S], input_pos [1]) -> logits [1, S, V]
             update_cache(k, k_cache, start); update_cache(v, v_cache, start)
             s = custom_sdpa(q, k_cache, v_cache, start, …, scale)

    Keys and values that QuantizeKVCache rounded to 8 bits are held in int8, each token and head with its own
    scale. Constant expressions are folded first, for none can be told from a cache's content afterwards.
    `to_executorch` does all this itself; the pass is for looking at the result, or going on from it.

    Options:
        max_length (tokens): how much context the caches hold.
    """

    ensures: ClassVar[tuple[str, ...]] = ("kv cache",)
    forbids: ClassVar[tuple[str, ...]] = ("kv cache",)

    max_length: int = 512

    def __post_init__(self) -> None:
        require_context(self.max_length)

    def run(self, graph: fx.GraphModule) -> Report:
        require_decoder(graph, "a cache")
        folded = ready(graph)
        require_state(folded)
        cached = add_kv_cache(folded, self.max_length)
        sites = [n.name for n in graph.graph.nodes if "attention" in str(n.target)]
        graph.graph = cached.graph
        for name, value in parameters(cached).items():
            set_tensor(graph, name, value)
        set_info(graph, cached=info(cached).cached)
        graph.recompile()
        return Report(changed=sites)

    def verify(self, before: fx.GraphModule, after: fx.GraphModule, report: Report) -> float:
        """Compare a prompt in two pieces through the caches with the whole through the plain graph."""
        tokens = sample_tokens(before, batch=1).to(device_of(after))  # caches are written where they are
        with torch.no_grad():
            starts = [tokens.new_tensor([start]) for start in (0, 5)]
            pieces = [after(tokens[:, :5], starts[0]), after(tokens[:, 5:], starts[1])]
        for cache in written(after.graph):
            set_tensor(after, cache, torch.zeros_like(get_tensor(after, cache)))
        error = relative_error(torch.cat(pieces, 1).cpu(), run(before, tokens).cpu())
        if not error <= 1e-3:
            raise VerificationError(
                f"{self.name} promises to keep the function, but logits differ by {error:.1e}"
            )
        return error
