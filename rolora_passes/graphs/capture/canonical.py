"""Canonical form: one node for each composite that the passes reason about.

    mul(x, rsqrt(add(mean(pow(x, 2), -1), eps)))   ->  rms_norm(x, [d], None, eps)
    layer_norm(x, [d], w, b, eps)                  ->  add(mul(layer_norm(x, [d]), w), b)
    slice(linear(x, W, b), -1, i, j)               ->  linear(x, slice(W, 0, i, j), slice(b, 0, i, j))
    x*cos + cat(-x[h:], x[:h])*sin                 ->  rotary_embedding(x, cos, sin)
    view(x, [B, S, H, D]), view(x, [B, S, H*D])    ->  unflatten(x, -1, [H, D]), flatten(x, -2, -1)

    to(rms_norm(to(x, float32)), bfloat16)         ->  rms_norm(x)

Transpositions around attention sink until they meet and cancel; asserts, guards, casts to the type a
value has already, copies, inactive dropout and shape arithmetic go, and casts around what computes in
float32 itself (`graphs.casts`). Rules look at operators and shapes, never at names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from rolora_passes.errors import CaptureError
from rolora_passes.graphs import graph
from rolora_passes.graphs.capture import bookkeeping, casts, functional, fused, norms, rotary
from rolora_passes.graphs.dtypes import dtype_of, retyped
from rolora_passes.graphs.expressions import merge_equal
from rolora_passes.graphs.graph import aten, finish, is_op, op_name
from rolora_passes.graphs.inputs import DECODER, ENCODER, ENCODER_DECODER, input_names
from rolora_passes.graphs.operators import Trait, has
from rolora_passes.graphs.shapes import same_shape, shape_of
from rolora_passes.graphs.sources import keep_only_source, note_source

_CHECKS = ("_assert", "sym_constrain", "_guards_fn", "_assert_tensor_metadata")


def canonicalize(module: torch.nn.Module) -> fx.GraphModule:
    """Rewrite a module unlifted from an ExportedProgram into canonical form.

    Raises:
        CaptureError: the forward takes other inputs than `graphs.inputs` names, returns more than one
            tensor, or mutates a value in a way that cannot be made functional.
    """
    gm = _own(module)
    _remove_checks(gm)
    functional.make_functional(gm)
    _raise_precision(gm)
    rules: list[Callable[[fx.GraphModule], None]] = [
        _remove_copies,
        bookkeeping.count_positions,
        bookkeeping.drop_ones,
        fused.parts_to_slices,
        _static_views,
        fused.unbind_to_slices,
        merge_equal,  # the model computes some values twice (a centred x, a table's unsqueeze)
        fused.addmm_to_linear,
        norms.normalize,
        rotary.one_node,
        casts.absorb,
        rotary.whole_heads,
        fused.split_linears,  # after rotary: a partial rotary embedding also slices
        _sink_transposes,
        _remove_copies,
        _static_views,
    ]
    for rule in rules:
        rule(gm)
        gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return finish(_numbered(gm))


def _numbered(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes are called after their operators and counted: reports then name a site alike in
    every type, whatever casts there were on the way."""
    result = fx.GraphModule(torch.nn.Module(), fx.Graph())
    renamed: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), renamed.__getitem__)
            new = result.graph.create_node(node.op, node.target, args, kwargs, name=op_name(node))
            new.meta = dict(node.meta)
        else:
            new = result.graph.node_copy(node, renamed.__getitem__)
        if node.op == "get_attr":
            graph.set_tensor(result, node.target, graph.get_tensor(gm, node.target))
        keep_only_source(new)
        renamed[node] = new
    return result


def _own(module: torch.nn.Module) -> fx.GraphModule:
    """A flat copy: no higher-order calls, one node a tensor, parameters first, names without wrapper."""
    gm = fx.GraphModule(module, cast(fx.Graph, module.graph))
    _inline(gm)
    result = fx.GraphModule(torch.nn.Module(), fx.Graph())
    renamed: dict[fx.Node, fx.Node] = {}
    by_tensor: dict[int, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.users:
            tensor = graph.get_tensor(gm, node.target)
            if id(tensor) not in by_tensor:
                name = str(node.target).removeprefix("model.")
                graph.set_tensor(result, name, tensor)
                new = result.graph.create_node("get_attr", name, name=name.replace(".", "_"))
                new.meta["val"] = tensor
                by_tensor[id(tensor)] = new
            renamed[node] = by_tensor[id(tensor)]
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "call_function"):
            renamed[node] = result.graph.node_copy(node, lambda n: renamed[n])
            note_source(renamed[node])
        elif node.op == "output":
            value = node.args[0]
            if isinstance(value, (tuple, list)) and len(value) == 1:
                value = value[0]
            if not isinstance(value, fx.Node):
                raise CaptureError(f"expected a forward that returns logits alone, found {node.args[0]}")
            result.graph.output(renamed[value])
    if input_names(result) not in (DECODER, ENCODER, ENCODER_DECODER):
        raise CaptureError(
            "expected forward(tokens, positions), forward(tokens) or forward(tokens, decoder_tokens), "
            f"found inputs {list(input_names(result))}"
        )
    return result


def _inline(gm: fx.GraphModule) -> None:
    """Inline the bodies of `no_grad` and autocast regions, which hold when the graph runs anyway."""
    for node in list(gm.graph.nodes):
        if op_name(node) not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        place = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        body = cast(fx.GraphModule, gm.get_submodule(str(node.args[place].target)))
        outer = iter(node.args[place + 1 :])
        renamed: dict[fx.Node, fx.Node] = {}
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                renamed[inner] = next(outer)
            elif inner.op == "output":
                results = fx.node.map_arg(inner.args[0], renamed.__getitem__)
            else:
                with gm.graph.inserting_before(node):
                    renamed[inner] = gm.graph.node_copy(inner, renamed.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


def _remove_checks(gm: fx.GraphModule) -> None:
    for node in reversed(gm.graph.nodes):
        checks = node.op in ("call_function", "call_module") and not node.users
        if checks and (op_name(node).startswith(_CHECKS) or str(node.target).startswith(_CHECKS)):
            gm.graph.erase_node(node)


def _raise_precision(gm: fx.GraphModule) -> None:
    """In a float64 model, casts to float32 for precision's sake would lower it: widen them, and literals."""
    if dtype_of(gm) != torch.float64:
        return
    for node in gm.graph.nodes:
        node.args, node.kwargs = retyped((node.args, node.kwargs), lambda _: torch.float64)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            node.meta["val"] = value = value.to(torch.float64)
            if node.op == "get_attr":
                graph.set_tensor(gm, node.target, value)


def _remove_copies(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if is_op(node, "cat"):  # without its empty parts
            parts = [p for p in node.args[0] if 0 not in (shape_of(p) or ())]
            node.args = (parts, *node.args[1:])
            if len(parts) == 1:
                node.replace_all_uses_with(parts[0])
        if node.op == "call_function" and _is_copy(node):
            node.replace_all_uses_with(node.args[0])


def _is_copy(node: fx.Node) -> bool:
    name, source = op_name(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not node.users:
        return False
    if has(node, Trait.COPY):
        return True
    if name in ("dropout", "dropout_", "feature_dropout"):
        return node.args[2] is False
    if has(node, Trait.CAST):
        before, after = source.meta.get("val"), node.meta.get("val")
        return isinstance(before, torch.Tensor) and before.dtype == after.dtype
    if name in (
        "view",
        "reshape",
        "_unsafe_view",
        "expand",
        "slice",
        "flatten",
        "unflatten",
        "_reshape_copy",
    ):
        return same_shape(source, node)
    return False


def _static_views(gm: fx.GraphModule) -> None:
    """Splitting or merging the last axes needs no batch or sequence length: say so."""
    for node in list(gm.graph.nodes):
        if not is_op(node, "view", "reshape", "_unsafe_view"):
            continue
        source, before, after = node.args[0], shape_of(node.args[0]), shape_of(node)
        if before is None or after is None:
            continue
        new = _static_view(gm, node, source, before, after)
        if new is not None:
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)


def _static_view(
    gm: fx.GraphModule, node: fx.Node, source: fx.Node, before: tuple[object, ...], after: tuple[object, ...]
) -> fx.Node | None:
    lead = len(before) - 1
    if len(after) > len(before) and after[:lead] == before[:lead]:
        tail = list(after[lead:])
        if all(isinstance(size, int) for size in tail):
            return graph.insert(gm, node, aten.unflatten.int, source, -1, tail)
    if len(after) < len(before):
        kept = len(after) - 1
        if after[:kept] == before[:kept] and all(isinstance(size, int) for size in before[kept:]):
            return graph.insert(gm, node, aten.flatten.using_ints, source, kept - len(before), -1)
        if after[-kept:] == before[-kept:] and kept > 0:
            return graph.insert(gm, node, aten.flatten.using_ints, source, 0, len(before) - len(after))
    return None


def _sink_transposes(gm: fx.GraphModule) -> None:
    """Move transpositions of two inner axes below what works on the last axis, until two meet and cancel."""
    changed = True
    while changed:
        changed = False
        for node in list(gm.graph.nodes):
            if _cancel(node) or _swap(gm, node):
                changed = True
        gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def _axes(node: object) -> tuple[int, int] | None:
    """The two axes a node transposes, neither of them the last; else None."""
    if not is_op(node, "transpose") or shape_of(node) is None:
        return None
    rank = len(shape_of(node))
    first, second = sorted(a % rank for a in node.args[1:3])
    return (first, second) if second < rank - 1 else None


def _cancel(node: fx.Node) -> bool:
    if not node.users or not is_op(node, "transpose") or _axes(node) is None:
        return False
    if _axes(node.args[0]) != _axes(node):
        return False
    node.replace_all_uses_with(node.args[0].args[0])
    return True


def _swap(gm: fx.GraphModule, node: Any) -> bool:
    if not is_op(node, "rms_norm", "layer_norm", "mul", "add", "silu", "slice") or not node.users:
        return False
    moved = [a for a in node.all_input_nodes if _axes(a) is not None]
    others = [a for a in node.all_input_nodes if a not in moved]
    if len(moved) != 1 or any(len(shape_of(o) or (0, 0)) > 1 for o in others):
        return False
    transposed = moved[0]
    if is_op(node, "slice") and node.args[1] % len(shape_of(node)) != len(shape_of(node)) - 1:
        return False
    new = gm.graph.node_copy(node)
    node.append(new)
    new.replace_input_with(transposed, transposed.args[0])
    first, second = _axes(transposed) or (0, 0)
    new.meta["val"] = node.meta["val"].transpose(first, second)
    back = graph.insert_after(gm, new, aten.transpose.int, new, *transposed.args[1:3])
    back.meta = dict(node.meta)
    node.replace_all_uses_with(back)
    return True
