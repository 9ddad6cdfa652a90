"""The structure of a graph for the page: basis classes, sizes, what passes changed and left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from rolora_passes.debugging.pairing import layers_of, sites_of
from rolora_passes.graphs.accounting import weigh
from rolora_passes.graphs.bases.inference import Group, ParameterAxis, infer_bases
from rolora_passes.graphs.graph import KEPT, argument, constants, get_tensor, is_op, linears, root_names
from rolora_passes.graphs.info import Rotation
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.inspection.summary import GROUPS, alike, layerless
from rolora_passes.passes.manager import Record

_FEW = 3  # sites named as examples


def basis_map(graph: fx.GraphModule, rotations: Mapping[str, Rotation]) -> dict[str, Any]:
    """Which axes of which parameters change basis together; identical layers are shown once.

    Args:
        graph: with norms fused, before rotation.
        rotations: `GraphInfo.rotations` of the rotated graph.
    """
    classes = infer_bases(graph).classes
    shown = [c for c in classes if c.free or c.kind != "inner" or c.group is Group.PERMUTATION]
    methods = {r.about.get("class"): r.method for r in rotations.values()}
    columns, cells = [], dict[str, dict[int, list[str]]]()
    for number, group in enumerate(alike(shown)):
        first = group[0]
        columns.append(
            {
                "name": first.name if len(group) == 1 else f"{first.kind}, {len(group)} alike",
                "size": first.size,
                "admits": GROUPS[first.group],
                "free": first.free,
                "blocked": None if first.free else re.sub(r"\.\d+\.", ".*.", first.why_rigid()),
                "turned": methods.get(first.name),
            }
        )
        for axis in (axis for cls in group for axis in cls.parameters):
            marks = cells.setdefault(layerless(axis.parameter), {}).setdefault(number, [])
            if _mark(axis) not in marks:
                marks.append(_mark(axis))
    names = _in_order(graph)
    rows = [
        {"name": name, "count": len(of), "cells": cells[name]} for name, of in names.items() if name in cells
    ]
    return {"classes": columns, "rows": rows, "pinned": len(classes) - len(shown)}


def _mark(axis: ParameterAxis) -> str:
    """`axis 1 reads`: the axis of the parameter, and whether it takes the matrix or its inverse transpose."""
    place = str(axis).removeprefix(f"{axis.parameter} ")
    return f"{place} {'reads' if axis.flipped else 'writes'}"


def _in_order(graph: fx.GraphModule) -> dict[str, set[str]]:
    """Parameters by their names without layers, in the order the graph reads them."""
    known, names = constants(graph), dict[str, set[str]]()
    for node in graph.graph.nodes:
        for operand in node.all_input_nodes if node not in known else ():
            if operand in known:
                parameter = root_names(operand)[0]
                names.setdefault(layerless(parameter), set()).add(parameter)
    return names


def sizes(graph: fx.GraphModule) -> dict[str, Any]:
    """Bits and megabytes of every linear and table, and in total; a tied table counts with its linear."""
    shapes, names = infer_shapes(graph, only=constants(graph)), sites_of(graph)
    layers, found = layers_of(graph, names), []
    for linear in linears(graph):
        reads = linear.args[0]
        activation = (
            argument(reads, "bits") if is_op(reads, "fake_quantize", "fake_quantize_static") else None
        )
        entry = _weight(graph, linear.args[1], shapes)
        found.append({"name": names[linear.name], "layer": layers.get(linear), **entry, "reads": activation})
    shared = {root_names(linear.args[1])[0] for linear in linears(graph)}
    for table in graph.graph.nodes:
        if is_op(table, "embedding") and root_names(table.args[0])[0] not in shared:
            name = root_names(table.args[0])[0].removesuffix(".weight")
            found.append(
                {"name": name, "layer": None, **_weight(graph, table.args[0], shapes), "reads": None}
            )
    total = weigh(graph)
    return {
        "sites": found,
        "elements": total.elements,
        "megabytes": total.megabytes,
        "bits": total.bits_per_weight,
        "by_bits": [[bits, count] for bits, count in total.by_bits.items()],
    }


def _weight(graph: fx.GraphModule, weight: Any, shapes: dict[fx.Node, Any]) -> dict[str, Any]:
    """A weight's shape, bits, group size, and megabytes with its scales."""
    if not is_op(weight, *KEPT):
        root = get_tensor(graph, root_names(weight)[0])
        width = root.element_size() * 8
        return {"shape": list(root.shape), "bits": width, "group": None, "mb": root.numel() * width / 8e6}
    integers, scale = (shapes[node] for node in weight.args[:2])
    bits, groups = argument(weight, "bits"), scale.shape[-1]
    stored = integers.numel() * bits + scale.numel() * (16 if groups > 1 else 32)
    return {
        "shape": list(integers.shape),
        "bits": bits,
        "group": integers.shape[-1] // groups,
        "mb": stored / 8e6,
    }


def passes_done(records: Iterable[Record]) -> list[dict[str, Any]]:
    """What every pass changed, left and cost."""
    parts = ("name", "kind", "seconds", "verify_seconds", "peak_mb", "error", "nodes")
    return [
        {
            **{part: getattr(record, part) for part in parts},
            "changed": len(record.report.changed),
            "left": _by_reason(record.report.left),
        }
        for record in records
    ]


def _by_reason(left: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Sites grouped by the reason that they were left, ignoring numbers in it."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for site, reason in left:
        groups.setdefault(re.sub(r"\d+", "*", reason), []).append((site, reason))
    return [
        {"reason": entries[0][1], "count": len(entries), "sites": [site for site, _ in entries[:_FEW]]}
        for entries in groups.values()
    ]
