"""Equality of function, and the first value where it is lost."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rolora_passes.errors import VerificationError
from rolora_passes.graphs.bases import describe
from rolora_passes.graphs.graph import dtype_of, is_op, parameters, values

# Relative to the largest value. Rounding accumulates over depth; a wrong rewrite is off by its size.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}


def sample_tokens(graph: fx.GraphModule, batch: int = 2, length: int = 8) -> Tensor:
    """Random tokens int64 [batch, length] within the graph's vocabulary."""
    tables = [n.args[0] for n in graph.graph.nodes if is_op(n, "embedding")]
    rows = [p.shape[0] for name, p in parameters(graph).items() if p.dim() == 2 and p.shape[0] > 1]
    size = graph.meta.get("config", {}).get("vocab_size") or (min(rows) if tables and rows else 2)
    return torch.randint(0, size, (batch, length), generator=torch.Generator().manual_seed(0))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    scale = float(expected.abs().max()) or 1.0
    return float((found - expected).abs().max()) / scale


def verify_same(before: fx.GraphModule, after: fx.GraphModule, name: str, moved: set[str]) -> float:
    """Check that two graphs compute the same logits on sample tokens.

    Args:
        name: the pass, for the message.
        moved: names of values that a change of basis moved; they are not compared.

    Returns: the relative error of the logits.

    Raises:
        VerificationError: with the first value of that name in both graphs that differs.
    """
    tokens = sample_tokens(before)
    allowed = TOLERANCE[dtype_of(before)]
    expected, found = _logits(before, tokens), _logits(after, tokens)
    error = relative_error(found, expected)
    if not error <= allowed:
        raise VerificationError(
            f"{name} promises to keep the function, but logits differ by {error:.1e} (relative; "
            f"allowed {allowed:.0e}). {_first_difference(before, after, tokens, moved, allowed)}"
        )
    return error


def _logits(graph: fx.GraphModule, tokens: Tensor) -> Tensor:
    result: Tensor | None = None
    for _, value in values(graph, tokens):
        result = value
    assert result is not None
    return result


def _first_difference(
    before: fx.GraphModule, after: fx.GraphModule, tokens: Tensor, moved: set[str], allowed: float
) -> str:
    known = {
        node.name: value
        for node, value in values(before, tokens)
        if isinstance(value, Tensor) and node.op == "call_function" and value.is_floating_point()
    }
    for node, value in values(after, tokens):
        reference = known.get(node.name)
        if reference is None or not isinstance(value, Tensor) or node.name in moved:
            continue
        if value.shape != reference.shape:
            continue
        error = relative_error(value, reference)
        if not error <= allowed:
            return f"The first value that differs is {describe(node)}, by {error:.1e}."
    return "No single value differs that both graphs have."
