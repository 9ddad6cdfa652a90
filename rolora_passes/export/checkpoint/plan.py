"""What a checkpoint will hold, before any of it is computed; what it cannot hold is refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import LoweringError
from rolora_passes.export.checkpoint import matching
from rolora_passes.export.checkpoint.matching import match
from rolora_passes.export.checkpoint.origin import Origin
from rolora_passes.export.checkpoint.solving import Equation, solve, value_of
from rolora_passes.graphs.graph import is_op, root_names
from rolora_passes.graphs.info import info
from rolora_passes.tensor_files import Form, form

_REMEDIES = {
    matching.HADAMARD: "its inverse is in the weight, so it cannot be left out; set r4: false in the recipe",
    matching.QUERIES: "set r3: false in the recipe; or leave the quantizers of keys out, and it cancels",
    matching.BRANCH: "add merge-lora to the recipe",
    matching.BIAS: "leave fuse-norm and rotate out of the recipe",
    matching.CENTRING: "leave fuse-norm and rotate out of the recipe",
    **{words: f"leave it out (--leave-out {name})" for name, words in matching.ROUNDING.items()},
}


@dataclass(frozen=True)
class Plan:
    """How every tensor of a checkpoint comes about.

    Attributes:
        graph: which the checkpoint is to compute.
        origin: the model, with a head of its own if the graph needs one.
        equations: by the name of a tensor of the model's state; what is not there stays as it was.
        computed: by the name of what the model computes from its configuration (frequencies): unchanged.
        forms: of the files' tensors, in order.
        owners: by the name of a file's tensor, the one of the model's state that it is of.
    """

    graph: fx.GraphModule
    origin: Origin
    equations: dict[str, list[Equation]]
    computed: dict[str, list[Equation]]
    forms: dict[str, Form]
    owners: dict[str, str]

    @property
    def type(self) -> torch.dtype:
        """The type of most of the files' elements, in which the model is loaded."""
        elements = Counter[torch.dtype]()
        for dtype, shape in self.forms.values():
            elements[dtype] += prod(shape)
        return elements.most_common(1)[0][0]

    def value(self, name: str) -> Tensor:
        """A tensor of the model's state, of the form that the plan says.

        Raises:
            LoweringError: the graph has values for it that the model cannot have, or the type has not.
        """
        dtype = next(self.forms[part][0] for part, owner in self.owners.items() if owner == name)
        if name not in self.equations:
            return self.origin.unread[name].to(dtype)
        equations = self.equations[name]
        root = root_names(equations[0].own)[0]
        value = solve(self.graph, self.origin.graph, root, equations, dtype)
        if not torch.isfinite(value.sum(dtype=torch.float64)):
            raise LoweringError(
                f"expected values that {dtype} can hold, found larger ones in {name}: give another dtype"
            )
        return value


def make_plan(graph: fx.GraphModule, origin: Origin, dtype: torch.dtype | None = None) -> Plan:
    """Plan a checkpoint.

    Args:
        graph: what passes made of the model's.
        dtype: of floating-point tensors; None: the type that the model's files have each in.

    Raises:
        LoweringError: the graph has what a checkpoint cannot hold; names all of it, and what to do.
    """
    found = match(graph, origin.graph)
    if found.problems:
        raise LoweringError(_refusal(found.problems))
    held, untied = origin.outline.state_dict().keys(), False
    equations, computed = dict[str, list[Equation]](), dict[str, list[Equation]]()
    for root, own in _by_root(found.equations).items():
        names = [root, *(other for other, name in info(origin.graph).tied.items() if name == root)]
        if not held & {*names}:
            _require_unchanged(graph, origin.graph, root, own)
            computed[root] = own
        elif len(names) == 1:
            equations[root] = own
        else:
            parts = _by_name(origin, names, own)
            untied |= len(parts) > 1
            equations |= parts
    origin = origin.untied() if untied else origin
    return Plan(graph, origin, equations, computed, *_forms(origin, dtype))


def _by_root(equations: Iterable[Equation]) -> dict[str, list[Equation]]:
    """Equations by the parameter of the model that they are of; of several readers alike, the first."""
    found: dict[str, dict[Any, Equation]] = {}
    for each in equations:
        alike = (each.own, each.value, is_op(each.reader, "embedding"))
        found.setdefault(root_names(each.own)[0], {}).setdefault(alike, each)
    return {root: [*own.values()] for root, own in found.items()}


def _refusal(problems: dict[str, list[str]]) -> str:
    lines = [
        f"{what} at {min(where)}{f' and {len(where) - 1} more' if len(where) > 1 else ''}"
        + (f": {_REMEDIES[what]}" if what in _REMEDIES else "")
        for what, where in problems.items()
    ]
    return (
        "expected a graph that differs from the model's in its parameters alone, for a checkpoint holds "
        f"nothing else; found {'; '.join(lines)}"
    )


def _require_unchanged(
    graph: fx.GraphModule, own: fx.GraphModule, name: str, equations: Sequence[Equation]
) -> None:
    """Refuse other values of what the model computes itself (frequencies) and no file holds."""
    for equation in equations:
        before = value_of(own, equation.own, (), torch.float64)
        if not torch.equal(value_of(graph, equation.value, before.shape, torch.float64), before):
            raise LoweringError(
                f"the graph has other values of {name}, which the model computes from its configuration: a "
                "checkpoint cannot hold them"
            )


def _by_name(origin: Origin, names: Sequence[str], equations: list[Equation]) -> dict[str, list[Equation]]:
    """The equations of a tied table: for table and head apart, if the graph's differ."""
    table, head = origin.names
    if len({(each.own, each.value) for each in equations}) == 1:
        return {table if table in names else names[0]: equations[:1]}
    if {*names} != {table, head}:
        raise LoweringError(
            f"the graph has different values for {', '.join(names)}, which the model holds in one: a "
            "checkpoint of the model cannot hold both"
        )
    parts: dict[str, list[Equation]] = {table: [], head: []}
    for each in equations:
        parts[table if is_op(each.reader, "embedding") else head].append(each)
    return {name: own for name, own in parts.items() if own}


def _forms(origin: Origin, dtype: torch.dtype | None) -> tuple[dict[str, Form], dict[str, str]]:
    """The forms of the files' tensors, and what each is of."""
    forms, owners = dict[str, Form](), dict[str, str]()
    for name, value in origin.state():
        parts = origin.in_files(name, value)
        own = origin.types.get(next(iter(parts)), origin.type) if dtype is None else dtype
        for part, meta in parts.items():
            forms[part] = form(meta.to(own) if meta.is_floating_point() else meta)
            owners[part] = name
    return forms, owners
