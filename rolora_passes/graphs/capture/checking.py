"""Comparing a graph that was captured with the model, or the program, that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import CaptureError, one_line
from rolora_passes.graphs.capture.attention import static_experts
from rolora_passes.graphs.capture.kinds import Kind
from rolora_passes.graphs.capture.stored import Reading
from rolora_passes.graphs.devices import computing_on, device_of
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.running import run_on, values
from rolora_passes.graphs.verify import relative_error, sample_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Lengths that a configuration may name and from which on something changes.
_SIZES = ("sliding_window", "attention_chunk_size", "local_attention", "original_max_position_embeddings")
_CHUNKS = ("chunk_size", "mamba_chunk_size")  # of scans
_LONGEST_CHECK = 160  # tokens: longer windows than this allows are compared by what the masks say alone


def ropes(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What the configuration says of rotary embeddings: one for all layers, or one for each kind of layer."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return [rope for rope in (found, *found.values()) if isinstance(rope, dict)]


def compare_exported(graph: fx.GraphModule, exported: torch.export.ExportedProgram) -> None:
    """Compare a graph with its program on random tokens of the example's shape."""
    args, kwargs = exported.example_inputs
    generator = torch.Generator().manual_seed(0)
    size = sample_tokens(graph, 1, 64).max() + 1

    def drawn(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dtype == torch.int64 and not bool(value.any())
        return (
            torch.randint(0, int(size), value.shape, generator=generator).to(value.device) if whole else value
        )

    args, kwargs = fx.node.map_aggregate((args, kwargs), drawn)
    with torch.no_grad():
        expected = exported.module(check_guards=False)(*args, **kwargs)
        found = graph(*args, **kwargs)
    expected = expected[0] if isinstance(expected, (tuple, list)) else expected
    error, allowed = relative_error(found, expected), max(1e-4, 50 * torch.finfo(expected.dtype).eps)
    if not error <= allowed:
        raise CaptureError(
            f"expected the graph to compute what the exported program does, found a relative difference of "
            f"{error:.1e} (allowed {allowed:.0e})"
        )


def _run(graph: fx.GraphModule, inputs: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
    try:
        return run_on(graph, inputs)
    except RuntimeError as error:
        raise CaptureError(
            f"the graph of {type(model).__name__} does not run at another sequence length than it was "
            f"captured at (a state space or recurrence?): {one_line(error)}"
        ) from error


def compare(
    graph: fx.GraphModule, model: PreTrainedModel, kind: Kind, weights: Mapping[int, Tensor] | None = None
) -> None:
    """Compare graph and model on random tokens; in float32 where the model is narrower, as rounding hides
    what is wrong.

    Args:
        weights: what parameters of the model hold, by `id`, where they have no values themselves.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(0, vocabulary, (2, _length(graph, model)), generator=generator)
    with torch.no_grad(), static_experts(model), computing_on(device_of(graph)):
        inputs = inputs_for(graph, tokens)
        own = {n: value for n, value in inputs.items() if n != "positions"}  # the model counts them too
        with Reading(weights or {}):
            expected = kind.call(model, own)
        found = _run(graph, inputs, model)
        for what, logits in (("itself", expected), ("as a graph", found)):
            if not bool(torch.isfinite(logits).all()):
                raise CaptureError(
                    f"{type(model).__name__} {what} returns NaN or infinite logits on random tokens in "
                    f"{logits.dtype}: its weights are damaged, or too large for that type; "
                    "fetch it again, or load it in torch.float32"
                )
        if expected.dtype.itemsize < torch.float32.itemsize:
            with Reading(weights or {}, wide=True):
                expected = kind.call(model, own)
            for _, value in values(graph, tokens, torch.float32):
                found = value
    error, allowed = relative_error(found, expected), 1e-4  # the model's own float32 islands bound it
    if not error <= allowed:
        raise CaptureError(
            f"expected the graph's logits to equal the model's, found a relative difference of {error:.1e} "
            f"(allowed {allowed:.0e}) in {type(model).__name__}: it computes something capture does not see"
        )


def _length(graph: fx.GraphModule, model: PreTrainedModel) -> int:
    """How many tokens to compare: more than every window or chunk that is short enough to be seen cheaply."""
    config = model.config.get_text_config()
    sizes = [node.args[5] for node in graph.graph.nodes if is_op(node, "attention") and len(node.args) > 5]
    sizes += [getattr(config, key, None) for key in _SIZES]
    sizes += [rope.get(key) for rope in ropes(model) for key in _SIZES]
    sizes = [2 * size + 4 for size in sizes if isinstance(size, int) and 2 * size + 4 <= _LONGEST_CHECK]
    chunks = [getattr(config, key, None) for key in _CHUNKS]
    sizes += [size + 1 for size in chunks if isinstance(size, int) and size < 2 * _LONGEST_CHECK]
    longest = getattr(config, "max_position_embeddings", None) or 2 * _LONGEST_CHECK
    return int(min(max(12, *sizes, 12), longest))
