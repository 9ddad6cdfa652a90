"""Everything the library knows of one operator, in one record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, Protocol

from torch import fx

from rolora_passes.errors import PluginError
from rolora_passes.graphs.bases.variables import Axis
from rolora_passes.graphs.operators.places import Place, Places
from rolora_passes.graphs.operators.steps import AxisMap

Call = Any  # an fx.Node of the operator that a rule is for, whose arguments that operator types


class Trait(Flag):
    """What is true of an operator, or not.

    Attributes:
        CAST: changes the type, and nothing else.
        COPY: gives the same values again.
        VIEW: moves elements without changing them.
        ACTIVATION: a non-linearity whose result linears read, which a transform at run time can spread.
        KEPT: what is left of a quantizer (integers, scales -> weight): a constant expression ends before it,
            or there would be nothing for a kernel to read.
        QUANTIZES: rounds a weight to integers that a KEPT operator reads.
        FAKE_QUANTIZES: rounds activations.
        INSERTED: a pass puts it there, under a name from a counter.
        ONE_TYPE: wants one type of all its operands.
        UNWRITTEN: makes memory without values.
        BLIND: looks at the shape of its operand alone, not at its values.
        ON_LOGITS: may stand between a model's head and its output: channels do not mix.
        ON_SCORES: may stand between a router and what chooses by its scores, as what is ON_LOGITS may.
        CHOOSES: gives places, not values: which is the largest.
    """

    CAST = auto()
    COPY = auto()
    VIEW = auto()
    ACTIVATION = auto()
    KEPT = auto()
    QUANTIZES = auto()
    FAKE_QUANTIZES = auto()
    INSERTED = auto()
    ONE_TYPE = auto()
    UNWRITTEN = auto()
    BLIND = auto()
    ON_LOGITS = auto()
    ON_SCORES = auto()
    CHOOSES = auto()


NONE = Trait(0)


class Scope(Protocol):
    """What a basis rule may ask of the inference: the axes and shapes of a node's operands."""

    def of(self, node: Any) -> list[Axis]:
        """The axes of an operand."""

    def known(self, node: object) -> bool:
        """Whether a value has axes: it is a tensor."""

    def shape(self, node: object) -> Any:
        """The sizes of a value, or None where it is no tensor or its shape is unknown."""

    def parts(self, node: Any) -> tuple[Any, ...]:
        """The axes of every result of an operand that has several; () if it has one."""

    def shapes_of_parts(self, node: Any) -> list[tuple[int, ...]]:
        """The sizes of every result of an operator that has several."""

    def masks(self, node: object) -> bool:
        """Whether a value is true or false."""

    def fresh(self, size: int, node: fx.Node | None = None, why: str = "") -> Axis:
        """A new axis; rigid if a reason is given."""


class Spans(Protocol):
    """What a scaling rule may ask about the operands of a node."""

    def __call__(self, operand: object, whole: bool = False) -> bool:
        """Whether it is a floating-point tensor with the result's last axis; `whole`: with all its axes."""


class Words(Protocol):
    """What a rule for words may ask about the graph that a node stands in."""

    def shape(self, value: Any) -> tuple[int, ...]:
        """The sizes of a value."""

    def size(self, value: Any) -> int | None:
        """The last of them; None where the shape is not known."""

    def weight(self, value: Any) -> str | None:
        """A weight's sizes, how it is stored and what it is made of; None of a value that is no weight."""

    def plain(self, node: Any, whole_numbers: bool = False) -> str:
        """An operator by its name, the parameters it reads, and the numbers and types it is given."""


@dataclass(frozen=True)
class Operator:
    """One operator. What its record leaves out is not known of it, and nothing is assumed:

    without `basis` it makes rigid what it reads and writes; without `positions` it is taken to mix positions
    where it reads any; without `axis_map` no adapter is carried over it; without `scaling` no scale passes.

    Attributes:
        name: as torch has it, "aten::linear"; "operator.getitem" for Python's.
        schema, implementation: of an operator that is not defined elsewhere, "(Tensor x) -> Tensor": it is
            made of torch's own operators, so it runs on any device and differentiates.
        result: what it gives of tensors without values, given its arguments; None: found by running it on
            them.
        basis: what it does to the bases of its operands' axes. Returns the axes of its result (a tuple of
            these for several results); None: no rule for these operands after all.
        scaling: the values whose scales, multiplied, are the scale of its result's last axis: one tuple an
            equation.
        axis_map: how it maps one axis of a weight, its first operand.
        positions: where positions run in its result.
        by_row: the operands whose rows its own are made of, each for itself, so that a matrix can be done in
            blocks of rows; none if it mixes rows.
        words: what it is, in words, where its name, parameters and numbers do not say it; of a KEPT operator,
            how it stores a weight.
        sign: what stands between its operands in a formula: "*". Without one it is written as a call.
        shown: how many arguments that call shows; None for all.
        folded: endings for what its results become when they are folded: "_scale".
        traits: see `Trait`.

    Raises:
        PluginError: the name has no namespace, or only one of schema and implementation is given.
    """

    name: str
    schema: str | None = None
    implementation: Callable[..., Any] | None = None
    result: Callable[..., Any] | None = None
    basis: Callable[[Scope, Call], Any] | None = None
    scaling: Callable[[Call, Spans], list[tuple[fx.Node, ...]]] | None = None
    axis_map: AxisMap | None = None
    positions: Callable[[Places, Call], Place | None] | None = None
    by_row: Callable[[Call], Sequence[fx.Node]] | None = None
    words: Callable[[Words, Call], str] | None = None
    sign: str = ""
    shown: int | None = None
    folded: tuple[str, ...] = ()
    traits: Trait = NONE

    def __post_init__(self) -> None:
        if "::" not in self.name and not self.name.startswith("operator."):
            raise PluginError(
                f"expected the name of an operator with its namespace, such as acme::scale_rows, "
                f"found {self.name!r}"
            )
        if (self.schema is None) != (self.implementation is None):
            raise PluginError(
                f"{self.name}: expected a schema with its implementation, or neither (an operator that torch "
                "knows already)"
            )


def alike(names: str, **known: Any) -> Iterator[Operator]:
    """A record for each of several of ATen's operators of which the same is known."""
    for name in names.split():
        yield Operator(f"aten::{name}", **known)


def every_operand(node: Call) -> list[fx.Node]:
    """For `by_row`: an operator that works element by element, or along rows."""
    found: list[fx.Node] = node.all_input_nodes
    return found
