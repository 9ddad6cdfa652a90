"""The distance of a quantized graph from its float twin, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.debugging.pairing import logits_of, pair_values
from rolora_passes.debugging.tracking import NodeError, in_step, track_errors
from rolora_passes.evaluation.sensitivity import compare_logits
from rolora_passes.graphs.evaluate import call, compute
from rolora_passes.graphs.graph import constants, is_op


def describe_errors(
    graph: fx.GraphModule,
    twin: fx.GraphModule,
    tokens: Tensor,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """SQNR of every value by layer, and KL by layer and of the predictions, on tokens int64 [1, S]."""
    trace = track_errors(graph, twin, tokens, on_progress)
    series: dict[str, dict[str, list[Any]]] = {}
    sums: dict[int, int] = {}
    for node in trace.nodes:
        if node.layer is not None and node.kind in ("linear", "attention", "add"):
            row, listed = node.row(), series.setdefault(_series_name(node, sums), {"layer": [], "sqnr": []})
            for part, column in listed.items():
                column.append(row[part])
    totals = trace.row()
    return {
        **{part: totals[part] for part in ("kl", "nll", "top1")},
        "sqnr": totals["nodes"][-1]["sqnr"],
        "series": [{"name": name, **listed} for name, listed in series.items()],
        "lens": [{"layer": layer, "kl": kl} for layer, kl in layer_kl(graph, twin, tokens).items()],
        "skipped": totals["skipped"],
    }


def _series_name(node: NodeError, sums: dict[int, int]) -> str:
    """A value's name without its layer."""
    if node.site is not None:
        return node.site.partition(f".{node.layer}.")[2] or node.site
    if node.kind != "add":
        return node.kind
    assert node.layer is not None
    sums[node.layer] = sums.get(node.layer, 0) + 1
    return f"residual stream, sum {sums[node.layer]} of the layer"


def layer_kl(graph: fx.GraphModule, twin: fx.GraphModule, tokens: Tensor) -> dict[int, float]:
    """KL from the twin's predictions after each layer, nats per token (a logit lens).

    The final norm and the head are applied to the residual stream after every layer, so the last figure is
    the model's own. Empty if that part of the graph reads anything else.
    """
    sums = [pair for pair in pair_values(graph, twin)[0] if pair.kind == "add" and pair.layer is not None]
    if not sums:
        return {}
    behind = {pair.layer: pair for pair in sums}  # the last one in each layer
    heads = [_Head.behind(g, cut, tokens) for g, cut in ((graph, sums[-1].node), (twin, sums[-1].twin))]
    if None in heads:
        return {}
    found: dict[int, float] = {}
    for pair, *both in in_step(graph, twin, tokens, list(behind.values())):
        logits = [head(value)[0] for head, value in zip(heads, both, strict=True) if head is not None]
        assert pair.layer is not None
        found[pair.layer] = compare_logits(logits[0], logits[1], tokens[0])[0] / tokens.numel()
    return found


class _Head:
    """The part of a graph between a value of the residual stream and the logits."""

    def __init__(self, cut: fx.Node, steps: list[fx.Node], shared: Mapping[fx.Node, Any]) -> None:
        self._cut, self._steps, self._shared = cut, steps, shared

    @classmethod
    def behind(cls, graph: fx.GraphModule, cut: fx.Node, tokens: Tensor) -> _Head | None:
        """The part after `cut`; None if the logits also depend on other values computed from the tokens."""
        known, steps, stack = constants(graph), set[fx.Node](), [logits_of(graph)]
        while stack:
            node = stack.pop()
            if node.op == "placeholder":
                return None
            if node is not cut and node not in steps:
                steps.add(node)
                sizes = is_op(node, "sym_size")  # the number of tokens, not their ids
                stack += [n for n in node.all_input_nodes if not (sizes and n.op == "placeholder")]
        leaf = [n for n in steps if n in known and not known.issuperset(n.users)]
        shared = dict(zip(leaf, compute(graph, leaf), strict=True))
        shared |= dict.fromkeys(graph.graph.find_nodes(op="placeholder"), tokens)
        return cls(cut, sorted(steps - known), shared)

    def __call__(self, value: Any) -> Any:
        done = {**self._shared, self._cut: value}
        with torch.no_grad():
            for step in self._steps:
                done[step] = call(step, done.__getitem__)
        return done[self._steps[-1]]
