"""Quantizers as graph nodes: what a weight is on its grid, as an expression or as stored integers."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.graph import (
    add_parameter,
    finish,
    get_tensor,
    insert,
    insert_after,
    is_op,
    linears,
    root_names,
    set_tensor,
)
from rolora_passes.numerics.affine import Integers, fake_quantize_weight, straight_through
from rolora_passes.numerics.codebooks import Codebook
from rolora_passes.numerics.gptq import Quantized
from rolora_passes.numerics.grids import Grid

_rolora = torch.ops.rolora


def require_float32(graph: fx.GraphModule, name: str) -> None:
    """Check that a graph computes in the type that the kernels dequantize to.

    Raises:
        PassError: it does not; says how to convert it.
    """
    dtype = dtype_of(graph)
    if dtype != torch.float32:
        raise PassError(
            f"{name}: expected a graph in torch.float32, found {dtype}; "
            "convert it first: rolora_passes.graphs.convert(graph, torch.float32)"
        )


def require_bits(name: str, option: str, bits: int | None, low: int = 2) -> None:
    """Refuse a width that no grid here has; None is a value left in floating point.

    Raises:
        PassError: from the pass `name`, about its option.
    """
    if bits is not None and not low <= bits <= 8:
        raise PassError(f"{name}: {option} must be {low} to 8, found {bits}")


def require_group(name: str, site: str, width: int, group_size: int | None) -> None:
    """Refuse groups that do not divide an axis; names the ones that would.

    Raises:
        PassError: from the pass `name`, about a site.
    """
    if group_size is None or width % group_size == 0:
        return
    fits = [str(g) for g in (16, 32, 64, 128, 256) if width % g == 0]
    raise PassError(
        f"{name}: groups of {group_size} do not divide {site}, whose width is {width}; "
        f"use {' or '.join([*fits, 'None (one scale for all of it)'])}"
    )


def quantize_weight(graph: fx.GraphModule, before: fx.Node, weight: fx.Node, grid: Grid) -> fx.Node:
    """A weight rounded to the nearest of its grid, before a node; returns what stands for it.

    On integers dequantize(quantize(W, s, z), s, z); in a codebook decode(encode(W / s), s).
    """
    if isinstance(grid, Codebook):
        return encode_weight(graph, before, weight, _table(graph, grid), grid.bits, grid.group_size)
    known = (grid.group_size, grid.bits, grid.symmetric, grid.clip_search, grid.group_size is not None)
    chosen = insert(graph, before, _rolora.choose_qparams.default, weight, *known)
    scale, zero = (insert(graph, before, operator.getitem, chosen, i) for i in (0, 1))
    integers = insert(graph, before, _rolora.quantize.default, weight, scale, zero, grid.bits, grid.symmetric)
    shift = None if grid.symmetric else zero
    return insert(graph, before, _rolora.dequantize.default, integers, scale, shift, grid.bits)


def encode_weight(
    graph: fx.GraphModule, before: fx.Node, weight: fx.Node, table: fx.Node, bits: int, group_size: int | None
) -> fx.Node:
    """decode(encode(W / s), s) before a node, for a table that the graph has; returns the decoded node."""
    scale = insert(graph, before, _rolora.absmax.default, weight, group_size)
    codes = insert(graph, before, _rolora.encode.default, weight, scale, table)
    return insert(graph, before, _rolora.decode.default, codes, scale, table, bits)


def _table(graph: fx.GraphModule, grid: Codebook) -> fx.Node:
    """The codebook as a parameter, once in a graph."""
    name = f"codebooks.{grid.name}{grid.bits}"
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            found: fx.Node = node
            return found
    return add_parameter(graph, name, grid.table.clone())


def store_quantized(graph: fx.GraphModule, linear: fx.Node, quantized: Quantized, grid: Integers) -> None:
    """Have a linear read a weight that is on its grid already: integers and scales become parameters."""
    root = root_names(linear.args[1])[0]
    integers, scale = (
        add_parameter(graph, root + suffix, value.contiguous())
        for suffix, value in (("_q", quantized.integers), ("_scale", quantized.scale))
    )
    zero = None if grid.symmetric else add_parameter(graph, root + "_zero", quantized.zero.contiguous())
    linear.update_arg(1, insert(graph, linear, _rolora.dequantize.default, integers, scale, zero, grid.bits))


def straighten(graph: fx.GraphModule) -> None:
    """Let gradients pass straight through weights that the graph itself rounds.

    It is then for training alone: dequantize(quantize(W, s, z), s, z) becomes one operator with the gradient
    of W, which a codebook's decoded weight has too.
    """
    for node in list(graph.graph.nodes):
        if is_op(node, "dequantize") and is_op(node.args[0], "quantize"):
            weight, scale = node.args[0].args[:2]
            through = insert(graph, node, fake_quantize_weight, weight, *scale.args[0].args[1:])
            node.replace_all_uses_with(through)
        elif is_op(node, "decode") and is_op(node.args[0], "encode"):
            through = insert_after(graph, node, straight_through, node.args[0].args[0], node)
            node.replace_all_uses_with(through, delete_user_cb=lambda user, new=through: user is not new)
    finish(graph)


def stored_scales(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The scales that are parameters, by name, and the linears whose weights they are of."""
    found: dict[str, list[fx.Node]] = {}
    for linear in linears(graph):
        weight = linear.args[1]
        if is_op(weight, "dequantize", "decode") and weight.args[1].op == "get_attr":
            found.setdefault(weight.args[1].target, []).append(linear)
    return found


def held(scale: Tensor) -> Tensor:
    """Scales [out, groups] as kernels hold them: in bfloat16 where a row has several. Gains [d]: as is."""
    return scale.bfloat16().to(scale.dtype) if scale.dim() > 1 and scale.shape[-1] > 1 else scale


def open_scales(graph: fx.GraphModule, names: Collection[str]) -> None:
    """Put t in the place of a scale s = exp(t), rounded as kernels hold it; such a graph is for training."""
    for node in graph.graph.find_nodes(op="get_attr"):
        if node.target in names:
            scale = insert_after(graph, node, torch.ops.aten.exp.default, node)
            rounded = insert_after(graph, scale, _held, scale)
            node.replace_all_uses_with(rounded, delete_user_cb=lambda user, own=scale: user is not own)
            set_tensor(graph, node.target, get_tensor(graph, node.target).log())
    finish(graph)


def _held(scale: Tensor) -> Tensor:
    return straight_through(scale, held(scale))
