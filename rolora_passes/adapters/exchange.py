"""LoRA adapters onto a graph in any basis, and from it, as PEFT keeps them.

Beside PEFT's two files ours have a third, `rolora.json`, which says which base and basis they are for; PEFT
does not read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, fx

from rolora_passes.adapters.lora import Branch, find_branches, weight_shapes
from rolora_passes.adapters.peft_format import ABOUT, CONFIG, Adapter
from rolora_passes.adapters.peft_format import load_adapter as load_adapter
from rolora_passes.adapters.peft_tensors import PREFIX, WEIGHTS
from rolora_passes.errors import PassError
from rolora_passes.files import writing_folder
from rolora_passes.graphs.axis_maps import LowRank, Way, back, forth
from rolora_passes.graphs.dtypes import dtype_of
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import argument, site_names
from rolora_passes.graphs.identity import base_hash
from rolora_passes.graphs.info import info
from rolora_passes.graphs.lineage import plain, ways


def save_adapter(
    graph: fx.GraphModule, folder: str | Path, *, basis: Literal["model", "graph"] = "model", base: str = ""
) -> Path:
    """Write a graph's branches as PEFT loads them.

    Args:
        basis: "model": carried back to the model's own bases, so that PEFT loads them onto the model that was
            captured and computes what the graph does; "graph": as they are, for a graph in the same bases (a
            hash says which), say to change adapters under one quantized base.
        base: the model's name or folder, which PEFT loads a base by.

    Raises:
        PassError: no branches, or they cannot be carried back: a weight that is no longer the model's (init
            svd, a merged branch), a branch that was added after a LayerNorm's centring was folded and writes
            a mean, a gain of zero, an operator that no adapter can be carried over; weights that an adapter
            replaced; a folder that holds other files.
    """
    _require_own(Path(folder))
    branches = find_branches(graph)
    if not branches:
        raise PassError("expected a graph with low-rank branches, found none: run add-lora first")
    if replaced := info(graph).replaced:
        raise PassError(
            f"an adapter replaced {', '.join(replaced[:3])} of the base, which a folder of branches does "
            "not hold: keep that adapter's folder, or save the graph"
        )
    names, traced = site_names(graph), ways(graph)
    pieces: dict[str, dict[fx.Node, list[LowRank]]] = {}
    for branch in branches:
        linear, own = branch.linear, _values(graph, branch)
        if basis == "model":
            _require_way(traced[linear], names[linear])
            own = _carried_back(traced[linear], own, names[linear])
        module = names[linear] if basis == "graph" else traced[linear].module
        pieces.setdefault(module, {}).setdefault(linear, []).append(own)
    modules = {m: _of_module(m, parts, traced).to(dtype_of(graph)) for m, parts in pieces.items()}
    about = {"weights": base_hash(graph), "basis": basis_hash(graph) if basis == "graph" else None}
    with writing_folder(folder) as temporary:
        _write(temporary, modules, base)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1), "utf-8")
    return Path(folder)


def check_base(adapter: Adapter, graph: fx.GraphModule) -> None:
    """Refuse an adapter that says that it is another base's, or in another basis.

    Raises:
        PassError: it does.
    """
    if adapter.base is not None and adapter.base != (found := base_hash(graph)):
        known = (
            f"weights {found}" if found else "a graph of an older version, which does not know its weights"
        )
        raise PassError(
            f"expected an adapter of this base ({known}), found one of weights {adapter.base}: load the "
            "model that "
            f"it was made on; or, if this is that model in another form, delete the adapter's {ABOUT}"
        )
    if adapter.basis is not None and adapter.basis != (own := basis_hash(graph)):
        raise PassError(
            f"expected an adapter in the basis of this graph ({own}), found one in {adapter.basis}: save it "
            "with basis='model', which any graph of the base takes, or load it onto the graph it was made on"
        )


def linears_of(adapter: Adapter, graph: fx.GraphModule) -> dict[fx.Node, str]:
    """The linears that an adapter's branches go beside, and what the adapter calls them.

    Raises:
        PassError: it adapts what the graph lacks, or another size, or a weight that no branch can be carried
            to.
    """
    names, shapes, traced = site_names(graph), weight_shapes(graph), ways(graph)
    own = {n: names[n] if adapter.basis else traced[n].module for n in names}
    missing = sorted(set(adapter.modules) - set(own.values()))
    if missing:
        raise PassError(
            f"the adapter has branches for {len(missing)} modules that this graph lacks, such as "
            f"{missing[0]!r:.120}; its linears are named like {', '.join(list(own.values())[:3])}"
        )
    found = {node: module for node, module in own.items() if module in adapter.modules}
    for node, module in found.items():
        way, shape = traced[node], shapes[node]
        _require_fit(adapter.modules[module], module, shape if adapter.basis else way.root_shape(shape))
        if way.reason and not adapter.basis:
            raise PassError(f"no adapter can be carried to {names[node]}: {way.reason}")
    return found


def branches_of(
    adapter: Adapter, graph: fx.GraphModule, linears: Mapping[fx.Node, str]
) -> dict[fx.Node, LowRank]:
    """An adapter's branches beside linears, which `linears_of` found, in the bases of the graph's weights."""
    traced = ways(graph)
    return {
        node: adapter.modules[module]
        if adapter.basis
        else forth(traced[node], adapter.modules[module].to(torch.float64))
        for node, module in linears.items()
    }


def _require_fit(branch: LowRank, module: str, shape: list[int]) -> None:
    found = [branch.b.shape[0], branch.a.shape[1]]
    if found != shape:
        raise PassError(
            f"expected an adapter of {module} for {shape[0]} x {shape[1]}, found one for "
            f"{found[0]} x {found[1]}: it was trained on another base"
        )


def basis_hash(graph: fx.GraphModule) -> str:
    """A name for the bases that all weights stand in, branches apart.

    It is equal for graphs that adapters can be exchanged between.
    """
    branches = {n for branch in find_branches(graph) for n in (branch.low, branch.high)}
    digest = hashlib.sha256()
    for node, way in ways(graph).items():
        if node not in branches:
            digest.update(json.dumps([way.root, [plain(s) for s in way.steps], way.reason]).encode())
            for name in sorted(way.tensors):
                digest.update(way.tensors[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_own(folder: Path) -> None:
    """That what a folder holds may be replaced."""
    others = {p.name for p in folder.iterdir()} - {CONFIG, WEIGHTS, ABOUT} if folder.is_dir() else set()
    if others or (folder.exists() and not folder.is_dir()):
        found = sorted(others)[0] if others else "a file"
        raise PassError(
            f"expected no folder {folder}, or an adapter alone in it, found {found}: choose another"
        )


def _values(graph: fx.GraphModule, branch: Branch) -> LowRank:
    def value(node: Any) -> Any:
        return None if node is None else compute(graph, [node], dtype=torch.float64)[0].cpu()

    a, b = value(branch.low.args[1]), value(branch.high.args[1])
    inner, outer = value(argument(branch.low, "bias")), value(argument(branch.high, "bias"))
    return LowRank(a, b, branch.scale, inner, outer)


def _require_way(way: Way, site: str) -> None:
    if way.reason:
        raise PassError(f"no adapter can be carried back from {site}: {way.reason}")
    if way.changed:
        raise PassError(
            f"the weight of {site} is no longer the model's (a matrix was added): its branch means nothing "
            "beside the model's; save it with basis='graph'"
        )


def _carried_back(way: Way, own: LowRank, site: str) -> LowRank:
    """A branch as the model holds it.

    Raises:
        PassError: no branch of the model is the same function.
    """
    found = back(way, own)
    again = forth(way, found).b
    if float((again - own.b).norm()) > 1e-6 * float(own.b.norm()):
        raise PassError(
            f"the branch of {site} writes a mean that the model's LayerNorm takes away: add it before "
            "fuse-norm, or save it with basis='graph'"
        )
    return found


def _of_module(module: str, parts: Mapping[fx.Node, list[LowRank]], traced: Mapping[fx.Node, Way]) -> LowRank:
    """The branch of a module: of the parts of a fused projection, or what all linears of its weight have.

    Raises:
        PassError: linears that share a weight have branches that differ.
    """
    whole = [_joined(own) for own in parts.values()]
    if len(whole) == 1 or any(step.kind == "slice" for linear in parts for step in traced[linear].steps):
        return _joined(whole)
    first = whole[0].scale * whole[0].b @ whole[0].a
    if any(not torch.allclose(p.scale * p.b @ p.a, first, rtol=1e-6, atol=1e-9) for p in whole[1:]):
        raise PassError(
            f"{len(whole)} linears share the weight of {module}, and their branches differ: the model has "
            "one; save them with basis='graph'"
        )
    return whole[0]


def _joined(parts: list[LowRank]) -> LowRank:
    """One branch of several on one module: of all of its parts, or of adapters beside each other."""
    first = parts[0]
    outer = [p.outer * (p.scale / first.scale) for p in parts if p.outer is not None]
    total = torch.stack(outer).sum(0) if outer else None
    same = all(p.a.shape == first.a.shape and torch.allclose(p.a, first.a, rtol=1e-9, atol=0) for p in parts)
    if same and all(p.scale == first.scale for p in parts):
        return LowRank(first.a, torch.stack([p.b for p in parts]).sum(0), first.scale, None, total)
    b = torch.cat([p.b * (p.scale / first.scale) for p in parts], 1)
    return LowRank(torch.cat([p.a for p in parts]), b, first.scale, None, total)


def _write(folder: Path, modules: dict[str, LowRank], base: str) -> None:
    ranks = {m: branch.a.shape[0] for m, branch in modules.items()}
    alphas = {m: branch.scale * ranks[m] for m, branch in modules.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    biased = any(branch.outer is not None for branch in modules.values())
    tensors = dict[str, Tensor]()
    for module, branch in modules.items():
        outer = branch.outer if branch.outer is not None else branch.b.new_zeros(len(branch.b))
        parts = {"lora_A.weight": branch.a, "lora_B.weight": branch.b} | (
            {"lora_B.bias": outer} if biased else {}
        )
        tensors |= {f"{PREFIX}{module}.{part}": value.contiguous() for part, value in parts.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": biased,
        "target_modules": sorted(modules),
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items() if a != alpha},
        "base_model_name_or_path": base,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1), "utf-8")
    save_file(tensors, folder / WEIGHTS)
