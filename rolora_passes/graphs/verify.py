"""Equality of function, and the first value where it is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from rolora_passes.errors import VerificationError
from rolora_passes.graphs.bases.inference import describe
from rolora_passes.graphs.evaluate import Change
from rolora_passes.graphs.graph import is_op, parameters
from rolora_passes.graphs.info import info
from rolora_passes.graphs.operators import Trait, has
from rolora_passes.graphs.products import Products
from rolora_passes.graphs.running import values
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.memory import release

# Of logits in float64, relative to the largest: rounding over the depth of a model stays below it.
EXACT = 1e-9
# A pass that rounds parameters may move the logits by so many times what rounding them again does: one of
# these draws of rounding errors. They are as large as rounding can be (half an ulp to a whole one), with
# random signs.
ROUNDINGS, DRAWS = 2.0, 4
_POOL = 1 << 20


@dataclass
class Verified:
    """The graph that was verified last, its logits, and products of its weights: of passes in a row, what the
    next one starts from."""

    graph: fx.GraphModule | None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    products: Products = field(default_factory=Products)


_verified: ContextVar[Verified | None] = ContextVar("verified", default=None)


def sample_tokens(graph: fx.GraphModule, batch: int = 2, length: int = 8) -> Tensor:
    """Random tokens int64 [batch, length] within the graph's vocabulary."""
    tables = [n.args[0] for n in graph.graph.nodes if is_op(n, "embedding")]
    rows = [p.shape[0] for name, p in parameters(graph).items() if p.dim() == 2 and p.shape[0] > 1]
    size = info(graph).vocabulary or (min(rows) if tables and rows else 2)
    return torch.randint(0, size, (batch, length), generator=torch.Generator().manual_seed(0))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    scale = float(expected.abs().max()) or 1.0
    return float((found - expected).abs().max()) / scale


def verify_same(before: fx.GraphModule, after: fx.GraphModule, name: str, moved: set[str]) -> float:
    """Check that two graphs compute the same logits on sample tokens.

    Both are computed in float64, whatever their type, so nothing but parameters is rounded, and a pass that
    rounds none must agree to `EXACT`. One that rounds parameters to their own type (as folding does) may
    differ by what that explains and no more: the parameters it changed are perturbed by rounding errors of
    their type, and the logits may differ by `ROUNDINGS` times what this moves them. For a whole model in
    bfloat16 that is a few hundredths, and the less the fewer parameters change.

    Args:
        name: the pass, for the message.
        moved: names of values that a change of basis moved; they are not compared.

    Returns: the relative error of the logits, in float64.

    Raises:
        VerificationError: with the first value of that name in both graphs that differs; or `after` does not
            run in its own types, or returns another type.
    """
    _require_types(before, after, name)
    return verify_logits(before, after, name, moved)


def verify_logits(before: fx.GraphModule, after: fx.GraphModule, name: str, moved: set[str]) -> float:
    """`verify_same` of graphs that may be of different types: both are computed in float64."""
    tokens, last = sample_tokens(before), _verified.get() or Verified()
    products = last.products
    products.off = 0.0
    expected = last.logits if last.graph is before else _logits(before, tokens, products)
    found = _logits(after, tokens, products)
    error, allowed = max(relative_error(found, expected), products.off), EXACT
    rounded = _rounded(before, after)
    for seed in range(DRAWS if rounded else 0):
        if error <= allowed:
            break
        again = _logits(after, tokens, change=_perturbing(rounded, seed))
        allowed = max(allowed, ROUNDINGS * relative_error(again, found))
    if not error <= allowed:
        raise VerificationError(
            f"{name} promises to keep the function, but logits differ by {error:.1e} (relative; "
            f"allowed {allowed:.0e}). {_first_difference(before, after, tokens, moved, allowed)}"
        )
    last.graph, last.logits = after, found
    release()
    return error


@contextmanager
def in_a_row(last: Verified) -> Iterator[None]:
    """Verify one of passes that follow one another: the logits after it are those before the next.

    From one to the next nothing may change a graph that was verified.
    """
    token = _verified.set(last)
    try:
        yield
    finally:
        _verified.reset(token)


def _require_types(before: fx.GraphModule, after: fx.GraphModule, name: str) -> None:
    """Types do not show where everything is computed in float64: they must fit together as they are."""
    (old,), (new,) = (graph.graph.find_nodes(op="output") for graph in (before, after))
    expected, types = infer_shapes(before)[old], infer_shapes(after)
    for node in after.graph.nodes:
        given = [types[a] for a in node.all_input_nodes if isinstance(types[a], Tensor)]
        mixed = has(node, Trait.ONE_TYPE) and len({value.dtype for value in given}) > 1
        if mixed:
            operands = ", ".join(f"{a} {_kind(types[a])}" for a in node.all_input_nodes)
            raise VerificationError(
                f"after {name} the graph does not run in its own types: {describe(node)} is given {operands}"
            )
    found = types[new]
    if isinstance(expected, Tensor) and isinstance(found, Tensor) and found.dtype != expected.dtype:
        raise VerificationError(f"after {name} the logits are {found.dtype}, expected {expected.dtype}")


def _kind(value: object) -> str:
    known = isinstance(value, Tensor)
    return f"{value.dtype} {list(value.shape)}".removeprefix("torch.") if known else ""  # type: ignore[attr-defined]


def _rounded(before: fx.GraphModule, after: fx.GraphModule) -> set[str]:
    """The names of the floating-point parameters that `after` has and `before` has not."""
    old = parameters(before)
    return {k for k, v in parameters(after).items() if v.is_floating_point() and old.get(k) is not v}


def _logits(
    graph: fx.GraphModule, tokens: Tensor, products: Products | None = None, change: Change | None = None
) -> Tensor:
    """In float64."""
    linear = None if products is None else products.linear
    *_, (_, result) = values(graph, tokens, torch.float64, change, linear=linear)
    assert isinstance(result, Tensor)
    return result


def _perturbing(names: set[str], seed: int) -> Change:
    """Rounding errors in parameters, each as large as one can be, with random signs.

    A pool of signs serves all: a block of values starts anywhere in it.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (_POOL,), generator=generator).double().sub_(0.5)

    def changed(name: str, value: Tensor) -> Tensor:
        if name not in names:
            return value
        start = int(torch.randint(0, _POOL, (1,), generator=generator))
        drawn = signs.roll(-start)[torch.arange(value.numel()) % _POOL] if value.numel() > _POOL else None
        if drawn is None:
            start = start % (_POOL - value.numel() + 1)
            drawn = signs[start : start + value.numel()]
        return (drawn.to(value.device) * torch.finfo(value.dtype).eps).add_(1).view(value.shape).mul_(value)

    return changed


def _first_difference(
    before: fx.GraphModule, after: fx.GraphModule, tokens: Tensor, moved: set[str], allowed: float
) -> str:
    """Both graphs run in step: values wait only where the order of the two differs."""
    names = {n.name for n in before.graph.nodes if n.op == "call_function"} - moved
    theirs, waiting = values(before, tokens, torch.float64), dict[str, Tensor]()
    for node, value in values(after, tokens, torch.float64):
        if node.name not in names or node.op != "call_function":
            continue
        while node.name not in waiting:
            other, reference = next(theirs)
            if other.name in names:
                waiting[other.name] = reference
        reference = waiting.pop(node.name)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != reference.shape:
            continue
        error = relative_error(value, reference)
        if not error <= allowed:
            return f"The first value that differs is {describe(node)}, by {error:.1e}."
    return "No single value differs that both graphs have."
