"""Whether a checkpoint, as transformers loads it, computes what its graph does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from rolora_passes.errors import CaptureError, LoweringError, VerificationError
from rolora_passes.export.checkpoint.plan import Plan
from rolora_passes.export.checkpoint.writing import check_sum
from rolora_passes.graphs.capture.checking import compare
from rolora_passes.graphs.capture.kinds import kind_of
from rolora_passes.graphs.graph import add_parameter, copy_graph, finish, get_tensor, upstream
from rolora_passes.graphs.verify import verify_logits
from rolora_passes.loading.models import load_outlined
from rolora_passes.ondisk import rest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How far what a model computes of its configuration may be off: it may round to half precision what it keeps.
_NEAR, _ROUNDED = 1e-5, 1e-2


def check_checkpoint(plan: Plan, folder: Path, sums: Mapping[str, int]) -> float:
    """Load a checkpoint with transformers and compare it with its graph.

    Every tensor must be the one that was written, bit for bit, under its own name. The model's logits on
    random tokens must be, to 1e-4, those of the graph with these tensors, and these the graph's own, up to
    what rounding its parameters to the files' type explains (`graphs.verify`).

    Returns: how far this rounding moves the graph's logits, relative to the largest.

    Raises:
        LoweringError: the checkpoint is not the graph's; says where.
    """
    try:
        model, _, weights = load_outlined(str(folder), plan.type)
    except CaptureError as error:
        raise LoweringError(f"transformers does not load what was written: {error}") from error
    state, buffers = {**model.state_dict(), **_tied(model, weights)}, dict(model.named_buffers())
    for name, expected in sums.items():
        same = name in state and check_sum(state[name], plan.type) == expected
        rest(state.get(name, torch.empty(0)))
        if not same:
            raise LoweringError(
                f"expected transformers to load {name} as it was written, found another value: this version "
                f"reads checkpoints of {type(model).__name__} in another form than it writes them"
            )
    _require_same_buffers(plan, buffers)
    again = _restored(plan, {**buffers, **state})
    try:
        held = dict(model.named_parameters())
        compare(again, model, kind_of(model), {id(held[name]): value for name, value in weights.items()})
        return verify_logits(plan.graph, again, "the checkpoint", set())
    except (CaptureError, VerificationError) as error:
        raise LoweringError(f"the checkpoint does not compute what its graph does: {error}") from error


def _tied(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored weights by every name that the model has for them."""
    by_id = {id(value): weights[name] for name, value in model.named_parameters() if name in weights}
    named = model.named_parameters(remove_duplicate=False)
    return {name: by_id[id(value)] for name, value in named if id(value) in by_id}


def _require_same_buffers(plan: Plan, found: Mapping[str, Tensor]) -> None:
    """Refuse a model whose frequencies, which it computes from its configuration, are others."""
    for name in plan.computed:
        expected, value = get_tensor(plan.origin.graph, name).double(), found.get(name)
        near = _ROUNDED if value is not None and value.itemsize < torch.float32.itemsize else _NEAR
        if value is None or not torch.allclose(value.double(), expected, rtol=near):
            raise LoweringError(
                f"the model computes other values of {name} from the configuration that was written than it "
                "had: a checkpoint cannot hold them"
            )


def _restored(plan: Plan, state: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph on the tensors of a checkpoint, in place of what they were made of."""
    result = copy_graph(plan.graph)
    nodes = {node.name: node for node in result.graph.nodes}
    made = dict[fx.Node, fx.Node]()
    for name, equations in {**plan.equations, **plan.computed}.items():
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
    made = dict[fx.Node, fx.Node]()
    for step in sorted(upstream([own])):
        if step.op == "get_attr":
            made[step] = parameter
        else:
            with result.graph.inserting_before(next(iter(result.graph.find_nodes(op="placeholder")))):
                made[step] = result.graph.node_copy(step, made.__getitem__)
    return made[own]
