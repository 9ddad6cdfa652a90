"""How a site differs between two graphs, in words."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.debugging.splice import Splice
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import KEPT, is_op, upstream

_QUANTIZED = 1.5  # a smaller ratio of scales comes from rounding and is no fault


def what_differs(splice: Splice, name: str) -> list[str]:
    """How the second graph's definition of a shared value differs from the first's.

    Operators that only one of them has, scales that are off, and how far the weights are apart.
    """
    texts = [splice.definition(side, name) for side in (0, 1)]
    found = _operators(*texts)
    found += _scales(splice, name)
    return found + _weight(splice, name)


def _operators(first: str, second: str) -> list[str]:
    """Operators that one definition has more of than the other, and both definitions if any are missing."""
    ours, theirs = (Counter(re.findall(r"(\w+)\(", text)) for text in (first, second))
    lines = [f"missing: {name}" for name in (ours - theirs).elements()]
    full = [f"bad:  {second}", f"good: {first}"] if lines else []  # added quantizers need no more words
    return lines + [f"additional: {name}" for name in (theirs - ours).elements()] + full


def _scales(splice: Splice, name: str) -> list[str]:
    """The group and row whose scale is furthest off in each quantized parameter, and by how much."""
    lines = []
    before, after = (splice.tensors(side, name) for side in (0, 1))
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        if not key.endswith("_scale") or a.shape != b.shape or a.dim() != 2 or torch.equal(a, b):
            continue
        ratio = (b.double() / a.double()).abs()
        row, group = divmod(int(ratio.log2().abs().nan_to_num(posinf=1e9).argmax()), a.shape[1])
        factor = float(ratio[row, group])
        if not 1 / _QUANTIZED < factor < _QUANTIZED:
            lines.append(
                f"{key}: group {group} of row {row}: scale is {factor:.3g}x the good graph's "
                f"({float(b[row, group]):.3g} instead of {float(a[row, group]):.3g}); "
                f"{int((a != b).sum())} of {a.numel()} scales differ"
            )
    return lines


def _weight(splice: Splice, name: str) -> list[str]:
    """How far a linear's weight is from the good graph's, and the row and group where it is furthest."""
    nodes = splice.shared[name]
    if not is_op(nodes[0], "linear") or not is_op(nodes[1], "linear"):
        return [f"{key}: {_change(*both)}" for key, both in _changed(splice, name).items()]
    weights = [_value(g, n.args[1]) for g, n in zip((splice.first, splice.second), nodes, strict=True)]
    if weights[0] is None or weights[1] is None or weights[0].shape != weights[1].shape:
        return []
    a, b = (w.double() for w in weights if w is not None)
    if torch.equal(a, b):
        return ["its weight is the same"]
    return [f"weight: {_change(a, b)}{_worst_block(a, b, _groups(nodes[1], splice.second))}"]


def _changed(splice: Splice, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    before, after = (splice.tensors(side, name) for side in (0, 1))
    return {
        key: (before[key].double(), after[key].double())
        for key in before.keys() & after.keys()
        if before[key].shape == after[key].shape and not torch.equal(before[key], after[key])
    }


def _change(a: Tensor, b: Tensor) -> str:
    off = float((b - a).norm() / a.norm().clamp_min(1e-300))
    return f"its norm is {float(b.norm() / a.norm().clamp_min(1e-300)):.3g}x the good one's, off by {off:.1%}"


def _worst_block(a: Tensor, b: Tensor, groups: int) -> str:
    """The row and group with the largest error, and the median error."""
    blocks = [w.unflatten(-1, (groups, -1)) for w in (a, b)]
    off = (blocks[1] - blocks[0]).norm(dim=-1) / blocks[0].norm(dim=-1).clamp_min(1e-300)
    row, group = divmod(int(off.nan_to_num(nan=1e300).argmax()), groups)
    where = f"row {row}" if groups == 1 else f"group {group} of row {row}"
    return f"; worst {where}, off by {float(off[row, group]):.1%} (median {float(off.median()):.1%})"


def _groups(node: Any, graph: fx.GraphModule) -> int:
    """The number of scales per row of a linear's weight."""
    weight = node.args[1]
    scale = _value(graph, weight.args[1]) if is_op(weight, *KEPT) else None
    return 1 if scale is None else int(scale.shape[-1])


def _value(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """A value that depends on parameters only; None if it depends on the input."""
    if any(n.op == "placeholder" for n in upstream([node])):
        return None
    (value,) = compute(graph, [node])
    return value if isinstance(value, Tensor) else None
