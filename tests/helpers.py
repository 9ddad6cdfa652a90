"""What pass tests share: captured graphs, and the one checker every one of them calls."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from architectures import tiny
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from rolora_passes import apply_passes, history
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import copy_graph, is_op, parameters, set_tensor
from rolora_passes.graphs.info import info
from rolora_passes.graphs.running import values
from rolora_passes.graphs.text import graph_text
from rolora_passes.graphs.verify import relative_error
from rolora_passes.passes.manager import PassLike


def model_of(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model of an architecture; shared, not to be changed."""
    return _model_and_graph(name, dtype)[0]


def captured(name: str, dtype: torch.dtype = torch.float64) -> fx.GraphModule:
    """The graph of a tiny model of an architecture; shared, for no pass changes its input."""
    return _model_and_graph(name, dtype)[1]


@functools.cache  # which would tell a default from the same value given: hence not on those above
def _model_and_graph(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, fx.GraphModule]:
    model = tiny(name, dtype)
    return model, capture(model)


def tokens_for(graph: fx.GraphModule, batch: int = 3, length: int = 9, seed: int = 5) -> Tensor:
    """Random tokens int64 [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, info(graph).config["vocab_size"], (batch, length), generator=generator)


def matrices(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The rotations and scales on a graph's record, by key."""
    return {key: rotation.matrix for key, rotation in info(graph).rotations.items()}


def count(graph: fx.GraphModule, *names: str) -> int:
    """How many nodes call one of these operators."""
    return sum(is_op(n, *names) for n in graph.graph.nodes)


def exactly(graph: fx.GraphModule, tokens: Tensor) -> Tensor:
    """A graph's logits computed in float64, whatever its type: no rounding but that of its parameters."""
    *_, (_, logits) = values(graph, tokens, torch.float64)
    assert isinstance(logits, Tensor)
    return logits


def difference(found: fx.GraphModule, expected: fx.GraphModule) -> float:
    """Relative difference of two graphs' logits on random tokens, in float64."""
    tokens = tokens_for(expected)
    return relative_error(exactly(found, tokens), exactly(expected, tokens))


def check(graph: fx.GraphModule, passes: Iterable[PassLike]) -> fx.GraphModule:
    """Apply passes: the input is untouched, and every record says truly whether it changed anything."""
    text, tensors = graph_text(graph), parameters(graph)
    copies = {name: value.clone() for name, value in tensors.items()}
    current = graph
    for step in passes:
        before = graph_text(current)
        current = apply_passes(current, [step])
        changed = graph_text(current) != before
        record = history(current)[-1]
        assert record.report.modified == changed, (
            f"{record.name} says {record.report}, graph changed: {changed}"
        )
        assert record.nodes[1] == len(current.graph.nodes)
    assert graph_text(graph) == text
    for name, value in parameters(graph).items():
        assert value is tensors[name] and torch.equal(value, copies[name]), f"a pass wrote into {name}"
    current.graph.lint()
    return current


def check_exact(
    graph: fx.GraphModule, passes: Iterable[PassLike], tolerance: float = 1e-10
) -> fx.GraphModule:
    """`check`, and the function is kept: in float64 the logits of a graph of any type agree on random tokens,
    for more than one length."""
    steps = list(passes)
    result = check(graph, steps)
    assert difference(result, graph) <= tolerance
    one = tokens_for(graph, 1, 1)
    assert relative_error(exactly(result, one), exactly(graph, one)) <= tolerance
    return result


def check_idempotent(graph: fx.GraphModule, step: PassLike) -> None:
    """A pass finds nothing more to do on what it made."""
    again = apply_passes(graph, [step])
    assert not history(again)[-1].report.modified
    assert graph_text(again) == graph_text(graph)


def randomized(graph: fx.GraphModule, part: str, seed: int = 3) -> fx.GraphModule:
    """A copy whose parameters with `part` in their name are random: adapters as training leaves them."""
    result, generator = copy_graph(graph), torch.Generator().manual_seed(seed)
    chosen = [name for name in parameters(result) if part in name]
    assert chosen
    for name in chosen:
        old = parameters(result)[name]
        set_tensor(
            result, name, torch.randn(old.shape, generator=generator, dtype=torch.float64).to(old.dtype) / 4
        )
    return result


class _Float64(TorchFunctionMode):
    """Every cast to float32, and every float32 result of a factory, becomes float64."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if function in (torch.Tensor.float,):
            return args[0].double()
        name = getattr(function, "__name__", "")
        if name == "type_as" and args[1].dtype == torch.float32:
            return args[0].double()
        return function(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """Models compute norms, rotary tables and softmaxes in float32; here in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)
