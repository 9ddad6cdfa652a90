"""Norms: RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import Any

from torch import fx

from rolora_passes.graphs.bases.variables import Group, limit, tag, unify
from rolora_passes.graphs.nodes import argument, op_name
from rolora_passes.graphs.operators.places import Place, Places, away_from, plain
from rolora_passes.graphs.operators.record import Call, Operator, Scope, Spans, Words


def _rms_norm(s: Scope, node: Call) -> Any:
    return _norm(s, node, Group.ORTHOGONAL, "keeps lengths only", argument(node, "weight"))


def _layer_norm(s: Scope, node: Call) -> Any:
    why = "subtracts the mean along the axis (fuse-norm folds that into what writes it, where it can)"
    return _norm(s, node, Group.PERMUTATION, why, argument(node, "weight"), argument(node, "bias"))


def _norm(s: Scope, node: Call, group: Group, why: str, *affine: object) -> Any:
    x = s.of(node.args[0])
    if len(node.args[1]) != 1:
        return None
    tag(x[-1], "norm")
    limit(x[-1], group, node, why)
    for value in affine:
        if value is not None:
            unify(x[-1], s.of(value)[0], node)
            limit(x[-1], Group.PERMUTATION, node, "scales the axis element by element")
    for axis in x[:-1]:
        limit(axis, Group.PERMUTATION, node, "normalises every row for itself")
    return list(x)


def _scaling(node: Call, spans: Spans) -> list[tuple[fx.Node, ...]]:
    """What a norm gives scales by what its gain and its bias both scale by."""
    if len(node.args[1]) != 1:
        return []
    affine = [argument(node, "weight"), argument(node, "bias")]
    if spans(affine[0]) and len(set(affine)) == 2 and all(a is None or spans(a) for a in affine):
        return [(a,) for a in affine if a is not None]
    return []


def _positions(i: Places, node: fx.Node) -> Place | None:
    place, rank = i.place(node.args[0]), i.rank(node.args[0])
    count = len(argument(node, "normalized_shape"))
    plain(place)
    away_from(place, range(rank - count, rank), "it normalises")
    return place


def _words(words: Words, node: Call) -> str:
    return op_name(node)


_KNOWN: dict[str, Any] = {"scaling": _scaling, "positions": _positions, "words": _words}

OPERATORS = (
    Operator("aten::rms_norm", basis=_rms_norm, **_KNOWN),
    Operator("aten::layer_norm", basis=_layer_norm, **_KNOWN),
)
