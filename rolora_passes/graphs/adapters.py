"""LoRA adapters as PEFT keeps them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Nothing here imports PEFT: the format is two files, and what it says is checked before any of it is used. A
third, `rolora.json`, says of ours which base and basis they are for; PEFT does not read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.axis_maps import LowRank, Way, back, forth
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.files import writing_folder
from rolora_passes.graphs.graph import argument, dtype_of, site_names
from rolora_passes.graphs.lora import Branch, find_branches
from rolora_passes.graphs.transport import plain, ways

CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "rolora.json"
_PREFIX = "base_model.model."
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
# What an adapter may say that a branch y += s·B A x is not.
_UNSUPPORTED = {
    "use_dora": "DoRA scales weights by their norms",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it changes rows of the embedding",
    "target_parameters": "it adapts parameters that no linear holds",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it acts from some tokens on (aLoRA)",
    "use_bdlora": "its matrices are in blocks (BD-LoRA)",
}


@dataclass(frozen=True)
class Adapter:
    """Branches by module, or by site where they are in a graph's own basis.

    Attributes:
        modules: A [rank, in], B [out, rank], the scale, and B's bias if there is one.
        basis: the hash of the graph's bases; None: those of the model.
        base: the hash of the model's configuration; None: not known (PEFT keeps a name).
    """

    modules: Mapping[str, LowRank]
    basis: str | None = None
    base: str | None = None


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote.

    Raises:
        PassError: no adapter there, a damaged one, or one that is more than low-rank branches on linears.
    """
    folder = Path(folder)
    known = _config(folder)
    for key, meaning in _UNSUPPORTED.items():
        if known.get(key):
            raise PassError(f"{folder}: expected low-rank branches alone, found {key}: {meaning}")
    if known.get("bias", "none") != "none":
        raise PassError(
            f"{folder}: expected bias none, found {known['bias']!r}: it changes the base's biases"
        )
    tensors, modules = _tensors(folder), dict[str, dict[str, Tensor]]()
    for name, value in tensors.items():
        part = next((p for p in _PARTS if name.endswith(f".{p}")), None)
        if part is None:
            raise PassError(f"{folder}: expected tensors that end in {', '.join(_PARTS)}, found {name}")
        modules.setdefault(name.removesuffix(f".{part}").removeprefix(_PREFIX), {})[part] = value
    _require_targets(folder, known.get("target_modules"), modules)
    found = {module: _branch(folder, module, parts, known) for module, parts in modules.items()}
    about = _json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    return Adapter(found, about.get("basis"), about.get("base"))


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
            a mean, a gain of zero, an operator that no adapter can be carried over.
    """
    branches = find_branches(graph)
    if not branches:
        raise PassError("expected a graph with low-rank branches, found none: run add-lora first")
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
    about = {"base": base_hash(graph), "basis": basis_hash(graph) if basis == "graph" else None}
    with writing_folder(folder) as temporary:
        _write(temporary, modules, base)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1))
    return Path(folder)


def check_base(adapter: Adapter, graph: fx.GraphModule) -> None:
    """Refuse an adapter that says that it is another base's, or in another basis.

    Raises:
        PassError: it does.
    """
    if adapter.base is not None and adapter.base != base_hash(graph):
        raise PassError(
            f"expected an adapter of this base (configuration {base_hash(graph)}), found one of "
            f"{adapter.base}"
        )
    if adapter.basis is not None and adapter.basis != (own := basis_hash(graph)):
        raise PassError(
            f"expected an adapter in the basis of this graph ({own}), found one in {adapter.basis}: save it "
            "with basis='model', which any graph of the base takes, or load it onto the graph it was made on"
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
                digest.update(way.tensors[name].detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_hash(graph: fx.GraphModule) -> str:
    """A name for what the graph was captured from: its configuration."""
    text = json.dumps(graph.meta.get("config", {}), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise PassError(f"expected an adapter in {folder}, found no {CONFIG}")
    known = _json(path)
    if known.get("peft_type") != "LORA":
        raise PassError(f"{path}: expected peft_type LORA, found {known.get('peft_type')!r}")
    return known


def _json(path: Path) -> dict[str, Any]:
    try:
        known: Any = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise PassError(f"{path} is damaged: {error}") from error
    if not isinstance(known, dict):
        raise PassError(f"expected an object in {path}, found {type(known).__name__}")
    return known


def _require_targets(folder: Path, targets: Any, modules: Collection[str]) -> None:
    """That there are tensors for every module that a list of targets names."""
    for target in targets if isinstance(targets, list) else []:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            raise PassError(f"{folder}: expected tensors of the target module {target}, found none")


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise PassError(f"expected {WEIGHTS} in {folder}, found none; save the adapter as safetensors")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise PassError(f"{path} is damaged: {error}") from error
    return tensors


def _branch(folder: Path, module: str, parts: dict[str, Tensor], known: dict[str, Any]) -> LowRank:
    a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        found = {p: list(t.shape) for p, t in parts.items()}
        raise PassError(f"{folder}: expected A [rank, in] and B [out, rank] of {module}, found {found}")
    if not all(bool(t.isfinite().all()) for t in parts.values()):
        raise PassError(f"{folder}: {module} holds values that are NaN or infinite")
    rank = _pattern(known.get("rank_pattern"), module, known.get("r"))
    if rank != a.shape[0]:
        raise PassError(f"{folder}: expected rank {rank} of {module}, found {a.shape[0]}")
    alpha = _pattern(known.get("alpha_pattern"), module, known.get("lora_alpha"))
    scale = alpha / (rank**0.5 if known.get("use_rslora") else rank)
    return LowRank(a, b, scale, None, parts.get("lora_B.bias"))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that fits the module's name, or its last parts."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _values(graph: fx.GraphModule, branch: Branch) -> LowRank:
    def value(node: Any) -> Any:
        return None if node is None else compute(graph, [node], dtype=torch.float64)[0]

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
        tensors |= {f"{_PREFIX}{module}.{part}": value.contiguous() for part, value in parts.items()}
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
    (folder / CONFIG).write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / WEIGHTS)
