"""InsertHadamard: online transforms where a rotation cannot be folded (QuaRot's and SpinQuant's R3, R4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.bases.inference import Bases, infer_bases
from rolora_passes.graphs.bases.rotations import add_rotation, check_orthogonal, load_rotations, only
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.graph import constants, finish, insert_after, is_op, root_names
from rolora_passes.graphs.operators import Trait, has
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.numerics import hadamard
from rolora_passes.passes.base import Pass, Report


@dataclass(frozen=True)
class InsertHadamard(Pass):
    """Spread outliers at run time by Hadamards that cancel.

    Before:                                  After:
        s = attention(q, k, v, scale)            s = attention(hadamard(q, h), hadamard(k, h), v, scale)
        m = mul(silu(gate), up)                  m = hadamard(mul(silu(gate), up), f)
        y = linear(m, Wdown)                     y = linear(m, hadamard(Wdown, f))

    Options:
        r3: transform queries and keys (after rotary embedding); the two cancel in q·k. Worth its cost
            when the key cache is quantized.
        r4: transform every elementwise product or non-linearity that linears read (a down projection's
            input), and those linears' weights.
        block (channels): transform blocks of this size; None: full width, K·2^m, or the largest
            constructible order that divides it.
        factors: write a transform as `kronecker(x, [A, B])`, the products by small matrices that a runtime
            makes of it anyway: the same function at the same cost, and learn-rotation can train A and B
            (FlatQuant, Sun et al., 2024).
        given: factors to take in place of the Hadamard's: a mapping or a file from `save_rotations`, keys
            "model.layers.{i}.self_attn.R3", "model.layers.{i}.mlp.R4.{factor}" (without the last part where
            there is one factor), i the place among its kind.

    Raises:
        PassError: a block that does not divide an axis, or given factors that fit no transform, have the
            wrong size, or are not orthogonal.
    """

    ensures: ClassVar[tuple[str, ...]] = ("hadamards inserted",)
    forbids: ClassVar[tuple[str, ...]] = ("hadamards inserted", "weights quantized", "cache quantized")

    r3: bool = True
    r4: bool = True
    block: int | None = None
    factors: bool = False
    given: str | Path | Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.given is not None and not self.factors:
            raise PassError("insert-hadamard: given factors need factors: true")
        if self.block is not None and not hadamard.constructible(self.block):
            raise PassError(
                f"insert-hadamard: no Hadamard of order {self.block} is known; use a power of two"
            )

    def run(self, graph: fx.GraphModule) -> Report:
        report = Report()
        bases, shapes, known = infer_bases(graph), infer_shapes(graph), constants(graph)
        turns = _Turns(graph, self.factors, self.given)
        for node in list(graph.graph.nodes):
            if is_op(node, "attention") and not isinstance(shapes[node.args[0]], torch.Tensor):
                report.left.append((node.name, "the width of its queries is not known"))
            elif self.r3 and is_op(node, "attention"):
                self._queries_and_keys(turns, node, bases, int(shapes[node.args[0]].shape[-1]), report)
            elif self.r4 and _spreads(node, known) and isinstance(shapes[node], torch.Tensor):
                self._product(turns, node, int(shapes[node].shape[-1]), known, report)
        turns.require_all_used()
        finish(graph)
        return report

    def _order(self, size: int) -> int:
        if self.block is None:
            return hadamard.largest_order(size)
        if size % self.block:
            raise PassError(f"insert-hadamard: blocks of {self.block} do not divide an axis of {size}")
        return self.block

    def _queries_and_keys(self, turns: _Turns, node: Any, bases: Bases, size: int, report: Report) -> None:
        cls = bases.of(node.args[0])[-1][0]
        if cls.free and cls.parameters:
            report.left.append((node.name, "queries and keys are free: rotate(others=...) folds this one"))
            return
        order = self._order(size)
        turn = turns.new("self_attn.R3", order)
        for place in (0, 1):
            node.update_arg(place, turn(node.args[place]))
        report.changed.append(f"{node.name}: queries and keys, order {order} of {size}")

    def _product(self, turns: _Turns, node: fx.Node, size: int, known: set[fx.Node], report: Report) -> None:
        readers = [u for u in node.users if is_op(u, "linear") and u.args[0] is node and u.args[1] in known]
        if not readers:
            if _reaches_matmul(node):
                report.left.append((node.name, "it is read by a product of two activations, not by a linear"))
            return
        order = self._order(size)
        turn = turns.new("mlp.R4", order)
        turned = turn(node)
        for reader in readers:
            reader.args = (turned, turn(reader.args[1]), *reader.args[2:])
        names = ", ".join(root_names(r.args[1])[0] for r in readers)
        report.changed.append(f"{names}: input, order {order} of {size}")


class _Turns:
    """Writes transforms after values: as one operator, or as factors that are parameters."""

    def __init__(
        self, graph: fx.GraphModule, factors: bool, given: str | Path | Mapping[str, Tensor] | None
    ) -> None:
        self._graph, self._factors, self._dtype = graph, factors, dtype_of(graph)
        self._given = {} if given is None else only("online", load_rotations(given))
        self._left = set(self._given)
        self._counts: dict[str, int] = {}

    def new(self, kind: str, order: int) -> Callable[[fx.Node], fx.Node]:
        """A function that turns the last axis of a value, and every value that it is given alike."""
        ops, graph = torch.ops.rolora, self._graph
        index = self._counts[kind] = self._counts.get(kind, -1) + 1
        if not self._factors:
            return lambda value: insert_after(graph, value, ops.hadamard.default, value, order)
        factors = self._parameters(f"model.layers.{index}.{kind}", order)

        def turn(value: fx.Node) -> fx.Node:
            after = max([value, *factors])
            return insert_after(graph, after, ops.kronecker.default, value, factors)

        return turn

    def _parameters(self, name: str, order: int) -> list[fx.Node]:
        """The factors of a transform, outermost first."""
        initial, found = hadamard.few_factors(order), []
        for place, matrix in enumerate(initial):
            key = f"{name}.{place}" if len(initial) > 1 else name
            about: dict[str, Any] = {"method": "hadamard", "construction": hadamard.describe(order)}
            if key in self._given:
                matrix, about = check_orthogonal(self._given[key], len(matrix), key), {"method": "given"}
                self._left.discard(key)
            found.append(add_rotation(self._graph, key, matrix, self._dtype, **about))
        return found

    def require_all_used(self) -> None:
        if self._left:
            raise PassError(f"insert-hadamard: given {sorted(self._left)[:3]} fit no transform of this graph")


def _spreads(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a value is made element by element: a non-linearity, or a product of two activations."""
    if node in known:
        return False
    both = is_op(node, "mul") and len(node.all_input_nodes) == 2 and not known & set(node.all_input_nodes)
    return both or has(node, Trait.ACTIVATION)


def _reaches_matmul(node: fx.Node) -> bool:
    """Whether a value goes through views alone into a matrix product with something not constant."""
    return any(is_op(u, "bmm", "matmul") or (has(u, Trait.VIEW) and _reaches_matmul(u)) for u in node.users)
