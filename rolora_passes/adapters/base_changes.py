"""What an adapter changes of its base: what its start took, whole parameters, rows of new tokens.

All of it is done to the model's parameters in the model's own basis, under the expressions that passes wrote
on them. So it needs the parameters as they were captured: after fold-constants it is refused.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx

from rolora_passes.adapters.lora import without
from rolora_passes.adapters.peft_format import Adapter
from rolora_passes.adapters.peft_tensors import MERGE
from rolora_passes.errors import PassError
from rolora_passes.graphs.axis_maps import LowRank, Way
from rolora_passes.graphs.graph import beside, get_tensor, set_tensor
from rolora_passes.graphs.identity import fingerprint, is_original
from rolora_passes.graphs.info import info, set_info
from rolora_passes.graphs.lineage import copies, ways
from rolora_passes.numerics.codebooks import absmax, decode, encode, normal_float

_BLOCK = 64  # of NF4, over a weight's values in the order they are stored
_RESIZE = "if it has new tokens, resize the model's embeddings first (model.resize_token_embeddings)"


def change_base(graph: fx.GraphModule, adapter: Adapter, linears: Collection[fx.Node]) -> list[str]:
    """Make a graph's parameters those that an adapter was trained beside; says which, and how.

    Args:
        linears: those that the adapter's branches go beside.

    Raises:
        PassError: a parameter is not there, of another size, tied to another, or no longer as it was
            captured.
    """
    traced = ways(graph)
    replaced = _replaced(graph, adapter)
    started = {traced[n].root: traced[n] for n in linears} if adapter.start and adapter.basis is None else {}
    done = []
    for root in sorted(started.keys() - replaced.keys()):  # a weight saved whole lacks what the start took
        rounded = _start(graph, adapter, started[root])
        replaced |= {} if rounded is None else {root: rounded}
        done += [f"{root}: less the {adapter.start} start"] if rounded is None else []
    for name, value in replaced.items():
        for same in copies(graph, name):  # fuse-norm may have given a tied head a name of its own for it
            set_tensor(graph, same, beside(graph, value))
        done.append(f"{name}: the adapter's own")
    if replaced:
        set_info(graph, replaced=tuple(sorted({*info(graph).replaced, *replaced})))
    return done


def _start(graph: fx.GraphModule, adapter: Adapter, way: Way) -> Tensor | None:
    """Take from a weight what PEFT takes from it when it loads the adapter, in the same precision.

    LoftQ's start is another weight, which is returned.
    """
    _require_original(graph, way.root, f"the {adapter.start} start (init_lora_weights) of the adapter")
    weight, branch = get_tensor(graph, way.root).detach().cpu(), adapter.modules[way.module]
    rank = branch.a.shape[0]
    if way.changed or rank > min(weight.shape) or branch.scale <= 0:
        what = "another adapter was merged" if way.changed else f"rank {rank} or scale {branch.scale}"
        raise PassError(
            f"the {adapter.start} start (init_lora_weights) cannot be taken from {way.root}: {what}"
        )
    if way.transposed and adapter.start != "pissa":
        raise PassError(
            f"the {adapter.start} start (init_lora_weights) of {way.root} is of a weight stored [in, out], "
            f"which PEFT takes for [out, in]; {MERGE}"
        )
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if adapter.start == "loftq":
        return _loftq(wide, rank, adapter.iterations).to(weight.dtype)
    taken = _pissa(wide, rank) if adapter.start == "pissa" else _olora(wide, rank, branch.scale)
    same = copies(graph, way.root)
    for node in [n for n in graph.graph.find_nodes(op="get_attr") if n.target in same]:
        readers = list(node.users)
        rest = without(graph, node, way.module, taken, weight.dtype)
        for reader in readers:
            reader.replace_input_with(node, rest)
    return None


def _pissa(weight: Tensor, rank: int) -> LowRank:
    """The largest singular values (Meng et al., 2024)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank(root[:, None] * vh[:rank], u[:, :rank] * root, 1.0)


def _olora(weight: Tensor, rank: int, scale: float) -> LowRank:
    """The first columns of Q and rows of R (Büyükakyüz, 2024)."""
    q, r = torch.linalg.qr(weight)
    return LowRank(r[:rank].contiguous(), q[:, :rank].contiguous(), scale)


def _loftq(weight: Tensor, rank: int, iterations: int) -> Tensor:
    """The weight on its grid after LoftQ's alternation, as PEFT does it: B A is not divided by the scale."""
    rounded = _nf4(weight)
    for _ in range(iterations - 1):
        branch = _pissa(weight - rounded, rank)
        rounded = _nf4(weight - branch.b @ branch.a)
    return rounded


def _nf4(weight: Tensor) -> Tensor:
    values = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % _BLOCK))
    scale, table = absmax(values, _BLOCK), normal_float(4)
    return (
        decode(encode(values, scale, table), scale, table)[: weight.numel()].reshape(weight.shape).to(weight)
    )


def _replaced(graph: fx.GraphModule, adapter: Adapter) -> dict[str, Tensor]:
    """The parameters that the adapter has in place of the graph's, whole, in their types."""
    tied, found = info(graph).tied, dict[str, Tensor]()
    for name, given in _by_parameter(graph, adapter).items():
        if {*given} != {name, *(other for other, own in tied.items() if own == name)}:
            raise PassError(
                f"the adapter has {sorted(given)[0]} of its own, and not what the model ties to it: PEFT "
                f"unties them; {MERGE}"
            )
        first, *others = given.values()
        if any(not torch.equal(first, other) for other in others):
            raise PassError(f"the adapter has {len(given)} tables for {name}, which the model ties; {MERGE}")
        found[name] = _fitting(graph, name, list(first.shape)).copy_(first)
    if adapter.rows_of_input and len({tied.get(name, name) for name in adapter.rows}) > 1:
        raise PassError(
            f"the adapter has rows of tokens for {' and '.join(adapter.rows)}, which the model does not tie: "
            f"a list (trainable_token_indices) without names means one; {MERGE}"
        )
    for name, (indices, rows) in adapter.rows.items():
        own = tied.get(name, name)
        if own in tied.values() and not adapter.rows_of_input:
            raise PassError(
                f"the adapter names {name} in trainable_token_indices, which the model ties to another: a "
                f"list alone, without names, means both; {MERGE}"
            )
        table = found[own] if own in found else _fitting(graph, own, None)
        if int(indices.max()) >= len(table) or rows.shape[1:] != table.shape[1:]:
            raise PassError(
                f"the adapter has rows {list(rows.shape[1:])} of tokens up to {int(indices.max())} for "
                f"{name}, which is {list(table.shape)}: {_RESIZE}"
            )
        found[own] = table.index_copy_(0, indices, rows.to(table.dtype))
    return found


def _by_parameter(graph: fx.GraphModule, adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """What an adapter has of its own by the graph's names for it, of tied ones all."""
    known, tied = info(graph).weights, info(graph).tied
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in adapter.replaced.items():
        own, module = tied.get(name, name), name.rpartition(".")[0]
        if module in adapter.modules and adapter.start is None and known.get(own) == fingerprint(value):
            continue  # PEFT saves the weight of a head beside its branch, though nothing trained it
        found.setdefault(own, {})[name] = value
    return found


def _fitting(graph: fx.GraphModule, name: str, shape: list[int] | None) -> Tensor:
    """A copy of a parameter that is still as it was captured, and of this shape, if one is given."""
    what = f"what the adapter has of its own (modules_to_save, tokens, biases), {name!r:.120},"
    _require_original(graph, name, what)
    known = get_tensor(graph, name).detach().cpu()
    if shape is not None and shape != list(known.shape):
        raise PassError(f"expected the adapter's {name} to be {list(known.shape)}, found {shape}: {_RESIZE}")
    return known.clone()  # on the CPU, as the adapter is


def _require_original(graph: fx.GraphModule, name: str, what: str) -> None:
    if name not in info(graph).weights:
        raise PassError(f"{what} has no place: the model that this graph is of has no {name!r:.120}; {MERGE}")
    same = copies(graph, name)
    if name not in same or not all(is_original(graph, name, copy) for copy in same):
        raise PassError(
            f"{what} needs {name} as the model has it, and passes or another adapter changed it here: put "
            f"add-lora before fold-constants and before what stores quantized weights, or {MERGE}"
        )
