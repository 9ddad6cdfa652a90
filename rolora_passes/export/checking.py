"""Running what was written, a prompt and then single tokens, against the graph that it was lowered from.

A graph in floating point and its program compute the same but for the order of sums. Where a graph rounds
activations, a kernel may round one the other way, or in groups of its own. How far that can move the logits
is measured by taking the rounding out of the graph; a program may be twice as far from the graph as that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rolora_passes.decoding.positions import position_only, tabulate
from rolora_passes.errors import LoweringError, RunError, one_line
from rolora_passes.export.target import Score
from rolora_passes.graphs.buffers import written
from rolora_passes.graphs.graph import argument, copy_graph, get_tensor, insert, is_op, set_tensor
from rolora_passes.graphs.info import info
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.running import run_on
from rolora_passes.graphs.sites import routers
from rolora_passes.graphs.verify import sample_tokens

EXACT = 1e-3
"""How far logits in floating point may be, relative to their size: hundreds of times their rounding."""
_HELD = 0.05  # of a graph with int8 caches, whose rounding cannot be taken out
_ROUTED = 0.3  # of a mixture whose activations are rounded: near a tie, another expert may be chosen
_PROMPT, _DECODED, _BEYOND = 12, 4, 2


@dataclass(frozen=True)
class Checked:
    """How a program that was just written compares with its graph.

    Attributes:
        name: the method, or the flavour.
        tokens: of the longest text that was compared, prompt and decoded.
        error: the largest difference of a step's logits, by its norm, relative to theirs.
        bound: how much it may be.
    """

    name: str
    tokens: int
    error: float
    bound: float

    def row(self) -> str:
        return (
            f"{self.name} runs as its graph: logits of {self.tokens} tokens, prompt and decoded, differ by "
            f"{self.error:.1e} (at most {self.bound:.1e})"
        )


class Reference:
    """Logits of a graph, and how far a program's may be from them.

    Args:
        graph: as `ready` made it, with caches or without.
        max_length: of the program; what depends on positions is what it is in a text of that length.
    """

    def __init__(self, graph: fx.GraphModule, max_length: int) -> None:
        self.graph, self.max_length = copy_graph(graph), max_length
        self.cached = info(graph).cached is not None
        if self.cached:
            for name in written(self.graph.graph):
                set_tensor(self.graph, name, get_tensor(self.graph, name).clone())
        else:
            _tabulate(self.graph, max_length)
        self.floating = _without_rounding(self.graph)
        self.routed = bool(routers(self.graph))
        attentions = [n for n in graph.graph.nodes if is_op(n, "attention")]
        self.window: int = max((argument(n, "window") or 0 for n in attentions), default=0)

    def text(self) -> Tensor:
        """Tokens int64 [1, T] beyond every window, as far as the program holds so many."""
        prompt = max(_PROMPT, self.window + _BEYOND)
        return sample_tokens(self.graph, 1, min(self.max_length, prompt + _DECODED))

    def logits(self, tokens: Tensor) -> tuple[Tensor, float]:
        """Logits [B, S, V] of tokens int64 [B, S] (of a graph with caches: B is 1), and the bound."""
        found = self._run(self.graph, tokens)
        if self.floating is None:
            held = any(is_op(n, "dequantize_per_token") for n in self.graph.graph.nodes)
            return found, _HELD if held else EXACT
        rounding = EXACT + 2 * max_distance(self._run(self.floating, tokens), found)
        return found, max(rounding, _ROUTED) if self.routed else rounding

    def _run(self, graph: fx.GraphModule, tokens: Tensor) -> Tensor:
        start = torch.zeros(1, dtype=torch.int64)
        inputs = {"tokens": tokens, "input_pos": start} if self.cached else inputs_for(graph, tokens)
        return run_on(graph, inputs)


def _tabulate(graph: fx.GraphModule, max_length: int) -> None:
    """Read what depends on positions alone from tables of the program's length, in place.

    A rotary embedding may have other angles for long texts.
    """
    positions = next((n for n in graph.graph.find_nodes(op="placeholder") if n.target == "positions"), None)
    if positions is not None:
        dependent = position_only(graph.graph, positions)
        for number, (node, (table, dim)) in enumerate(tabulate(graph, positions, max_length).items()):
            if node is positions:
                continue
            set_tensor(graph, f"checked.table_{number}", table)
            with graph.graph.inserting_before(node):
                whole = graph.graph.get_attr(f"checked.table_{number}")
                size = graph.graph.call_function(torch.ops.aten.sym_size.int, (positions, 1))
            read = insert(graph, node, torch.ops.aten.narrow.default, whole, dim, 0, size)
            node.replace_all_uses_with(read, delete_user_cb=lambda user: user not in dependent)
    graph.recompile()


def _without_rounding(graph: fx.GraphModule) -> fx.GraphModule | None:
    """A copy whose activations are not rounded; None where none are."""
    result = copy_graph(graph)
    rounding = [n for n in result.graph.nodes if is_op(n, "fake_quantize", "fake_quantize_static")]
    for node in rounding:
        node.replace_all_uses_with(node.args[0])
        result.graph.erase_node(node)
    result.recompile()
    return result if rounding else None


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of a difference, relative to what was expected; infinite where a value is not finite."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def max_distance(found: Tensor, expected: Tensor) -> float:
    """The largest distance of the logits of one position, of values [B, S, V]."""
    pairs = zip(found.flatten(0, -2), expected.flatten(0, -2), strict=True)
    return max(distance(*pair) for pair in pairs)


def check_decoder(name: str, score: Score, reference: Reference) -> Checked:
    """Compare a prompt in one call, and tokens decoded one by one after it.

    Raises:
        LoweringError: the logits of a step differ by more than they may; the program does not run.
    """
    tokens = reference.text()
    expected, bound = reference.logits(tokens)
    length, worst = tokens.shape[1], 0.0
    for start, end in _calls(length):
        what = f"{end} tokens of a prompt" if start == 0 else f"the token decoded at position {start}"
        found = running(name, lambda s=start, e=end: score(tokens[:, s:e], s))  # type: ignore[misc]
        error = max_distance(found, expected[:, end - found.shape[1] : end])
        require_near(name, what, error, bound)
        worst = max(worst, error)
    return Checked(name, length, worst, bound)


def _calls(length: int) -> Iterator[tuple[int, int]]:
    prompt = length - _DECODED
    yield 0, prompt
    for start in range(prompt, length):
        yield start, start + 1


def running(name: str, call: Callable[[], Tensor]) -> Tensor:
    """What the runtime gives; its errors, whatever they are, as ours."""
    try:
        return call()
    except (RunError, RuntimeError) as error:
        raise LoweringError(f"{name} was written, but does not run: {one_line(error)}") from error


def require_near(name: str, what: str, error: float, bound: float) -> None:
    if not error <= bound:
        raise LoweringError(
            f"{name} was written, but does not compute what its graph does: after {what} logits differ by "
            f"{error:.1e} of their norm, where at most {bound:.1e} is rounding; nothing was left. Report "
            "this, with the model; check=False leaves the program all the same"
        )


def rows(checks: Sequence[Checked]) -> list[str]:
    return [check.row() for check in checks]
