"""Whether a checkpoint, as transformers loads it, computes what its graph does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from rolora_passes.errors import CaptureError, LoweringError
from rolora_passes.export.checkpoint.plan import Plan
from rolora_passes.export.checkpoint.writing import check_sum
from rolora_passes.graphs.capture.checking import compare
from rolora_passes.graphs.capture.kinds import kind_of
from rolora_passes.graphs.evaluate import values_in
from rolora_passes.graphs.graph import add_parameter, copy_graph, finish, first_compute, parameters, upstream
from rolora_passes.graphs.verify import relative_error, sample_tokens
from rolora_passes.loading.models import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDED = 1e-2  # of buffers that a model in half precision rounds


def check_checkpoint(plan: Plan, folder: Path, sums: Mapping[str, int]) -> float:
    """Load a checkpoint with transformers and compare it with its graph.

    Every tensor must be the one that was written, bit for bit, under its own name. The logits on random tokens
    must then be the graph's, computed in float32 with these tensors: to 1e-4, whatever the files' type. So
    all that is between the two is that every parameter was rounded to that type, once.

    Returns: how far this rounding moves the graph's logits, relative to the largest.

    Raises:
        LoweringError: the checkpoint is not the graph's; says where.
    """
    try:
        model, _ = load_model(str(folder), plan.type)
    except CaptureError as error:
        raise LoweringError(f"transformers does not load what was written: {error}") from error
    state = model.state_dict()
    for name, expected in sums.items():
        if name not in state or check_sum(state[name], plan.type) != expected:
            raise LoweringError(
                f"expected transformers to load {name} as it was written, found another value: this version of "
                f"it reads checkpoints of {type(model).__name__} in another form than it writes them"
            )
    _require_same_buffers(plan, model)
    again = _restored(plan, state)
    try:
        compare(again, model, kind_of(model))
    except CaptureError as error:
        raise LoweringError(f"the checkpoint does not compute what its graph does: {error}") from error
    del model
    tokens = sample_tokens(plan.graph)
    return relative_error(*(_logits(graph, tokens) for graph in (again, plan.graph)))


def _require_same_buffers(plan: Plan, model: PreTrainedModel) -> None:
    """Refuse a model whose frequencies, which it computes from its configuration, are others."""
    found = dict(model.named_buffers())
    for name, expected in parameters(plan.origin.graph).items():
        if name in found and not torch.allclose(found[name].double(), expected.double(), rtol=_ROUNDED):
            raise LoweringError(
                f"the model computes other values of {name} from the configuration that was written than it "
                "had: a checkpoint cannot hold them"
            )


def _restored(plan: Plan, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph on the tensors of a checkpoint, in place of what they were made of."""
    result = copy_graph(plan.graph)
    nodes = {node.name: node for node in result.graph.nodes}
    made = dict[fx.Node, fx.Node]()
    for name, equations in plan.equations.items():
        parameter = add_parameter(result, f"checkpoint.{name}", state[name])
        for equation in equations:
            if isinstance(equation.value, fx.Node):
                new = _copied(result, equation.own, parameter)
                made.setdefault(nodes[equation.value.name], new)
    for value, new in made.items():
        value.replace_all_uses_with(new)
    return finish(result)


def _copied(result: fx.GraphModule, own: fx.Node, parameter: fx.Node) -> fx.Node:
    """An expression of the model's graph, over a parameter of another graph."""
    made, steps = dict[fx.Node, fx.Node](), sorted(upstream([own]))
    for step in steps:
        if step.op == "get_attr":
            made[step] = parameter
        else:
            with result.graph.inserting_before(first_compute(result)):
                made[step] = result.graph.node_copy(step, made.__getitem__)
    return made[own]


def _logits(graph: fx.GraphModule, tokens: Tensor) -> Tensor:
    *_, (_, logits) = values_in(graph, tokens, torch.float32)
    assert isinstance(logits, Tensor)
    return logits
