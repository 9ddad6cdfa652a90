"""Gains behind norms whose own were fused: what weights that are rounded read can still be scaled."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import torch
from torch import fx

from rolora_passes.graphs.axis_maps import Step
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.graph import (
    add_parameter,
    aten,
    finish,
    get_tensor,
    insert_after,
    is_op,
    linears,
    root_names,
    site_names,
)
from rolora_passes.graphs.lineage import keep_ways, name_of, ways


def insert_gains(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Multiply what a norm writes by a gain of one, wherever linears alone read it.

    A norm whose gain was not fused has a product for a reader, and is left; so is one before a weight that is
    read in another place too, where another gain would stand.

    Returns: the names of the gains, [d] each, and the linears behind them.
    """
    names, uses = site_names(graph), Counter(map(_weight, linears(graph)))
    found: dict[str, list[fx.Node]] = {}
    for norm in list(graph.graph.nodes):
        readers = sorted(norm.users)
        if not is_op(norm, "rms_norm", "layer_norm") or not readers:
            continue
        if all(is_op(u, "linear") and u.args[0] is norm and uses[_weight(u)] == 1 for u in readers):
            ones = torch.ones(norm.args[1], dtype=dtype_of(graph))
            gain = add_parameter(graph, f"{names[readers[0]]}.input_gain", ones)
            product = insert_after(graph, norm, aten.mul.Tensor, norm, gain)
            for reader in readers:
                reader.update_arg(0, product)
            found[str(gain.target)] = readers
    finish(graph)
    return found


def keep_gains(graph: fx.GraphModule, gains: Mapping[str, list[fx.Node]]) -> None:
    """Take gains, as they are now, into the ways of the weights behind them: adapters read the product."""
    traced = ways(graph)
    found = {}
    for gain, readers in gains.items():
        vector = get_tensor(graph, gain).detach().cpu().double()
        name = name_of(vector)
        for linear in readers:
            way = traced[linear].then(Step("div", "in", 0, (), (name,)))
            found[linear] = dataclasses.replace(way, tensors={**way.tensors, name: vector})
    keep_ways(graph, found)


def _weight(linear: fx.Node) -> str:
    return root_names(linear.args[1])[0]
