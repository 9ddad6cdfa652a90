"""Every operator's record, by name: the library's own, and those of other packages.

Another package names its records under the entry-point group `rolora_passes.operators`:

    [project.entry-points."rolora_passes.operators"]
    acme = "acme.operators:OPERATORS"

The value is a tuple of `Operator`. They are loaded once, when a record is first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import fx

from rolora_passes.errors import PluginError, one_line
from rolora_passes.graphs.operators import (
    attention,
    creation,
    elementwise,
    norms,
    parts,
    products,
    quantizers,
    reductions,
    rows,
    transforms,
    views,
)
from rolora_passes.graphs.operators.record import Operator, Trait
from rolora_passes.graphs.operators.steps import AxisMap
from rolora_passes.plugins import Registry

_TRADES = (
    attention, creation, elementwise, norms, parts, products, quantizers, reductions, rows, transforms, views,
)  # fmt: skip
OURS: tuple[Operator, ...] = tuple(record for trade in _TRADES for record in trade.OPERATORS)
_libraries: dict[str, torch.library.Library] = {}
_defined: set[str] = set()


def operator_of(subject: object) -> Operator | None:
    """The record of what a node calls, or of an operator itself; None if there is none.

    Raises:
        PluginError: records of another package cannot be loaded.
    """
    target = subject.target if isinstance(subject, fx.Node) else subject
    if isinstance(subject, fx.Node) and subject.op != "call_function":
        return None
    if isinstance(target, torch._ops.OpOverload):
        return operators().get(target._schema.name)
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", None)
    return operators().get(f"operator.{name}") if module == "_operator" else None


def has(node: object, traits: Trait) -> TypeGuard[Any]:
    """Whether a value is a call of an operator with one of these traits."""
    known = operator_of(node) if isinstance(node, fx.Node) else None
    return known is not None and bool(known.traits & traits)


def axis_map(kind: str) -> AxisMap:
    """The map that steps of a kind are.

    Raises:
        PluginError: no operator has such a map: the package that adds it is not installed.
    """
    maps = {r.axis_map.kind: r.axis_map for r in operators().values() if r.axis_map is not None}
    if kind not in maps:
        raise PluginError(
            f"expected one of the maps {', '.join(filter(None, sorted(maps)))}, found {kind!r}: install the "
            "package whose operator a weight of this graph went through"
        )
    return maps[kind]


def _wrong(name: str, found: object) -> str | None:
    known = isinstance(found, (list, tuple)) and all(isinstance(record, Operator) for record in found)
    return None if known else "which is no list of records: expected a tuple of Operator"


SETS: Registry[Sequence[Operator]] = Registry(
    "set of operators", "rolora_passes.operators", dict[str, Sequence[Operator]], _wrong, PluginError
)
"""The records of other packages."""


@cache
def operators() -> dict[str, Operator]:
    """All records, by name.

    Raises:
        PluginError: an entry point cannot be loaded, gives something else than records, or gives one that
            another package or the library has; names the distribution.
    """
    known = {record.name: record for record in OURS}
    maps = {record.axis_map.kind: record.axis_map for record in OURS if record.axis_map is not None}
    owners = dict.fromkeys(known, "rolora-passes")
    for entry in SETS:
        owner = str(SETS.origin(entry))
        for record in SETS[entry]:
            if record.name in known:
                raise PluginError(
                    f"{owner} adds a record for {record.name}, which {owners[record.name]} has: a record "
                    "cannot be replaced"
                )
            own = record.axis_map
            if own is not None and own.kind and maps.setdefault(own.kind, own) is not own:
                raise PluginError(
                    f"{owner} gives {record.name} an axis map of the kind {own.kind!r}, which another "
                    "operator has: give it a name of its own, such as the operator's"
                )
            known[record.name], owners[record.name] = record, owner
            try:
                _define(record)
            except RuntimeError as error:
                raise PluginError(
                    f"torch cannot define {record.name} of {owner}: {one_line(error)}; leave its schema and "
                    "implementation out if the package defines it itself"
                ) from error
    return known


def _define(record: Operator) -> None:
    """Make an operator known to torch, if its record says what it computes.

    It stays one node under `torch.export`, which keeps functional custom operators that are composites.
    """
    if record.implementation is None or record.name in _defined:
        return
    namespace, _, name = record.name.partition("::")
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    library.define(f"{name}{record.schema}")
    library.impl(name, record.implementation, "CompositeImplicitAutograd")
    _defined.add(record.name)


for _record in OURS:
    _define(_record)
