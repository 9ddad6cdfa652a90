"""Where a quantized graph departs from its float twin: the error of every linear, attention and sum."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.debugging.pairing import Pair, pair_values
from rolora_passes.errors import GraphFormatError
from rolora_passes.evaluation.sensitivity import compare_logits
from rolora_passes.graphs.running import values
from rolora_passes.numerics.exact import exact

_WORST = 3  # tokens kept per value


@dataclass(frozen=True)
class TokenError:
    """A token at which a value is far off.

    Attributes:
        window, position: its place in tokens [N, S].
        token: its id.
        error: norm of the difference, relative to the norm of the twin's value, at this token.
    """

    window: int
    position: int
    token: int
    error: float


@dataclass(frozen=True)
class NodeError:
    """How far a value of the quantized graph is from the same value of the twin.

    Attributes:
        name: of the node, in both graphs.
        kind: "embedding", "linear", "attention", "add" (of two activations: residuals) or "logits".
        site: the module of a linear, such as `model.layers.0.mlp.up_proj`; None for other values.
        layer: the number of its decoder layer, if the names of sites have one.
        sqnr: signal-to-quantization-noise ratio over all tokens, dB; infinite if there is no noise.
        relative: norm of the difference, relative to the norm of the twin's value, over all tokens.
        max_abs: the twin's largest magnitude.
        max_error: the largest difference.
        worst: the tokens with the largest error, the worst first.
    """

    name: str
    kind: str
    site: str | None
    layer: int | None
    sqnr: float
    relative: float
    max_abs: float
    max_error: float
    worst: tuple[TokenError, ...]

    @property
    def label(self) -> str:
        """The site, or what the value is and where, such as `layer 3 attention (attention_3)`."""
        where = "" if self.layer is None else f"layer {self.layer} "
        return self.site or f"{where}{self.kind} ({self.name})"

    def row(self) -> dict[str, Any]:
        """JSON; a figure that is not finite is None, and `relative` tells no noise from NaN."""
        return {k: _finite(v) for k, v in asdict(self).items()} | {"worst": [asdict(t) for t in self.worst]}


@dataclass(frozen=True)
class ErrorTrace:
    """The errors of a quantized graph, value by value.

    Attributes:
        nodes: in graph order; the last is of kind "logits".
        kl: divergence of the predictions from the twin's, nats per token.
        nll: growth of the mean negative log-likelihood of the next token, nats.
        top1: top-1 agreement with the twin, from 0 to 1.
        tokens: the shape (N, S) of the tokens that both graphs read.
        skipped: values that cannot be compared, each with the reason.
        seconds: for both graphs and all figures.
    """

    nodes: list[NodeError]
    kl: float
    nll: float
    top1: float
    tokens: tuple[int, int]
    skipped: list[tuple[str, str]]
    seconds: float

    def first_below(self, db: float) -> NodeError | None:
        """The first value in graph order whose SQNR is below a threshold or NaN; None if there is none."""
        return next((node for node in self.nodes if not node.sqnr >= db), None)

    def row(self) -> dict[str, Any]:
        """JSON."""
        plain = {"kl": self.kl, "nll": self.nll, "top1": self.top1, "seconds": self.seconds}
        return {
            **{key: _finite(value) for key, value in plain.items()},
            "tokens": list(self.tokens),
            "nodes": [node.row() for node in self.nodes],
            "skipped": [list(entry) for entry in self.skipped],
        }


@dataclass
class _Sums:
    """Running sums over one value, window by window; no copy of the value is kept."""

    noise: float = 0.0
    signal: float = 0.0
    max_abs: float = 0.0
    max_error: float = 0.0
    worst: list[TokenError] = field(default_factory=list)

    def add(self, found: Tensor, expected: Tensor, window: int, row: Tensor) -> None:
        """Add one window's values, [S, channels] each, for its tokens [S]."""
        difference = found - expected
        noise, signal = (
            torch.linalg.vector_norm(x, dim=-1, dtype=_sum_type(x)) for x in (difference, expected)
        )
        self.noise += float(exact(noise).square().sum())
        self.signal += float(exact(signal).square().sum())
        self.max_abs = max(self.max_abs, _largest(expected))
        self.max_error = max(self.max_error, _largest(difference))
        errors = (noise / signal.clamp_min(1e-30)).nan_to_num(nan=math.inf)
        top = errors.topk(min(_WORST, len(row)))
        found_here = [
            TokenError(window, place, int(row[place]), error)
            for error, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        self.worst = sorted([*self.worst, *found_here], key=lambda t: -t.error)[:_WORST]

    def figures(self) -> tuple[float, float, float, float, tuple[TokenError, ...]]:
        """(SQNR in dB, relative error, largest magnitude, largest difference, worst tokens)."""
        if self.noise == 0:
            return math.inf, 0.0, self.max_abs, self.max_error, ()
        ratio = self.noise / self.signal if self.signal else math.inf
        sqnr = -10 * math.log10(ratio) if math.isfinite(ratio) else math.nan
        return sqnr, math.sqrt(ratio), self.max_abs, self.max_error, tuple(self.worst)


def track_errors(
    graph: fx.GraphModule,
    reference: fx.GraphModule,
    tokens: Tensor,
    on_progress: Callable[[int, int], None] | None = None,
) -> ErrorTrace:
    """Run a quantized graph and its float twin side by side, and measure how far apart they are.

    The two run in step, value by value, one window at a time, and each value is freed after its last use, so
    the memory needed beyond one forward pass is the other graph's live values. Errors accumulate: a value's
    error includes those of everything before it. `evaluation.sensitivity` measures a site's own share.

    Args:
        graph, reference: the quantized graph and its float twin; values of the same name are compared.
        tokens: int64 [N, S].
        on_progress: called with the values compared and their number, over all windows.

    Raises:
        GraphFormatError: the logits of the two graphs differ in shape.
    """
    start = time.perf_counter()
    pairs, skipped = pair_values(graph, reference)
    sums = {pair.node: _Sums() for pair in pairs}
    totals = torch.zeros(3, dtype=torch.float64)
    for window, row in enumerate(tokens):
        for number, (pair, *both) in enumerate(in_step(graph, reference, row[None], pairs)):
            found, expected = (_by_token(value, len(row)) for value in both)
            if found is None or expected is None or found.shape != expected.shape:
                skipped[pair.node.name] = "it does not have one row per token, or its shape differs"
                continue
            sums[pair.node].add(found, expected, window, row)
            if pair.kind == "logits":
                totals += torch.tensor(compare_logits(found, expected, row), dtype=torch.float64)
            if on_progress:
                on_progress(window * len(pairs) + number + 1, len(pairs) * len(tokens))
    if pairs[-1].node.name in skipped:
        raise GraphFormatError("expected two graphs of one model, found logits of different shapes")
    (kl, nll, same), (windows, length) = totals.tolist(), tokens.shape
    return ErrorTrace(
        [_error(pair, sums[pair.node]) for pair in pairs if pair.node.name not in skipped],
        kl / tokens.numel(),
        nll / (windows * max(length - 1, 1)),
        same / tokens.numel(),
        (windows, length),
        list(skipped.items()),
        time.perf_counter() - start,
    )


def in_step(
    graph: fx.GraphModule, reference: fx.GraphModule, tokens: Tensor, pairs: list[Pair]
) -> Iterator[tuple[Pair, Any, Any]]:
    """Each pair with its two values."""
    ours, theirs = values(graph, tokens), values(reference, tokens)
    for pair in pairs:
        found = next(value for node, value in ours if node is pair.node)
        yield pair, found, next(value for node, value in theirs if node is pair.twin)


def _by_token(value: Any, length: int) -> Tensor | None:
    """A window's value as [S, channels]; None if it does not have one row per token."""
    if isinstance(value, Tensor) and (value.shape[:2] == (1, length) or value.shape[0] == length):
        return value.reshape(length, -1)
    return None


def _error(pair: Pair, sums: _Sums) -> NodeError:
    return NodeError(pair.node.name, pair.kind, pair.site, pair.layer, *sums.figures())


def _sum_type(x: Tensor) -> torch.dtype:
    """Norms are accumulated in float32 or better."""
    return torch.promote_types(x.dtype, torch.float32)


def _largest(x: Tensor) -> float:
    return max(abs(float(bound)) for bound in x.aminmax())


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
