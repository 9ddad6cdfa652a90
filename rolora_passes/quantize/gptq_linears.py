"""GPTQ over a graph: linears in its order, each on the inputs that the rounded ones before it make."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.files import writing
from rolora_passes.graphs.evaluate import evaluate
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.text import graph_text
from rolora_passes.memory import peak_mb
from rolora_passes.numerics.affine import Integers, dequantize
from rolora_passes.numerics.gptq import Quantized, gptq
from rolora_passes.quantize.stages import Stages

Sites = Mapping[fx.Node, tuple[str, Integers]]


@dataclass(frozen=True)
class _Stage:
    """The linears that read one value: they share its Hessian, and are rounded together."""

    input: fx.Node
    sites: Sites

    @property
    def names(self) -> str:
        return ", ".join(name for name, _ in self.sites.values())


def gptq_linears(
    graph: fx.GraphModule,
    sites: Sites,
    tokens: Tensor,
    *,
    damping: float,
    act_order: bool,
    work: Path | None,
    on_progress: Callable[[int, int], None],
    store: Callable[[fx.Node, Quantized, Integers], None],
) -> dict[str, Any]:
    """Quantize the weights of linears, one stage after another, in one forward pass over the tokens.

    A stage runs every window up to the value its linears read, gathers that value's Hessian, rounds the
    linears' weights, and hands them to `store`; the windows then go on through the rounded weights.

    Args:
        graph: rewritten in place, by `store`.
        sites: the linears to quantize, with the name and the grid of each.
        tokens: int64 [N, S].
        work: a folder where finished stages are kept until the run is over, so that one that was killed
            goes on from there; None to keep nothing. Runs that differ in anything have files of their own;
            equal ones share them, and the first to end removes them.
        on_progress: called with how much is done, and of how much.
        store: writes a weight into the graph: rewrites the linear's second argument.

    Returns: figures. "stages": for each, the "sites" with the relative error of their outputs
        (tr(ΔW·H·ΔWᵀ) / tr(W·H·Wᵀ)), how many "tokens" were seen, "dead_channels", seconds of the
        "forward" (with the Hessian) and of the "solve", whether it was "resumed", and the process's
        "peak_mb" so far.

    Raises:
        PassError: a weight cannot be rounded on what its input saw; names the sites.
    """
    plan = _stages(sites)
    prefix = "" if work is None else _fingerprint(graph, sites, tokens, damping, act_order)
    files = [work and work / f"gptq-{prefix}-{number}.safetensors" for number in range(len(plan))]
    windows = Stages(graph, tokens)
    rows, per_stage = len(tokens), len(tokens) + 1
    figures = []
    for number, (stage, file) in enumerate(zip(plan, files, strict=True)):
        done = number * per_stage
        saved = _load(file, stage) if file is not None else None
        start = time.perf_counter()
        hessian = Hessian()
        for window, value in enumerate(windows.advance(stage.input)):
            if saved is None:
                hessian.add(value)
            on_progress(done + window + 1, len(plan) * per_stage)
        seconds = time.perf_counter() - start
        results, row = saved or _solve(graph, stage, hessian, damping, act_order)
        if file is not None and saved is None:
            _save(file, results, row)
        for node, (name, grid) in stage.sites.items():
            store(node, results[name], grid)
        figures.append({**row, "forward": seconds, "resumed": saved is not None, "peak_mb": peak_mb()})
        on_progress(done + rows + 1, len(plan) * per_stage)
    for file in files:
        if file is not None:
            file.unlink(missing_ok=True)
    return {"stages": figures}


def _stages(sites: Sites) -> list[_Stage]:
    """Linears by the value they read, in the order in which the graph computes those values."""
    groups: dict[fx.Node, dict[fx.Node, tuple[str, Integers]]] = {}
    for node in sorted(sites):
        value = node.args[0]
        assert isinstance(value, fx.Node)
        groups.setdefault(value, {})[node] = sites[node]
    return [_Stage(value, groups[value]) for value in sorted(groups)]


class Hessian:
    """Σ xᵀx over the rows of values [..., n], in float32 or, where they are float64, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum: Tensor | None = None

    def add(self, value: Tensor) -> None:
        x = value.detach().flatten(0, -2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        width = x.shape[1]
        if self._sum is None:
            self._sum = x.new_zeros(width, width)
        self.rows += len(x)
        step = max(256, -(-width // 6))  # the lower triangle is the upper one's mirror: most is left out
        for start in range(0, width, step):
            stop = min(start + step, width)
            self._sum[:stop, start:stop].addmm_(x[:, :stop].t(), x[:, start:stop])

    def matrix(self) -> Tensor | None:
        """[n, n]; None if no value came."""
        return None if self._sum is None else self._sum.triu() + self._sum.triu(1).t()


def _solve(
    graph: fx.GraphModule, stage: _Stage, gathered: Hessian, damping: float, act_order: bool
) -> tuple[dict[str, Quantized], dict[str, Any]]:
    """Round a stage's weights, those with an equal grid in one go; and what is known of it afterwards."""
    start = time.perf_counter()
    hessian = gathered.matrix()
    if hessian is None or not hessian.count_nonzero():
        raise PassError(
            f"gptq: nothing but zeros reached {stage.names}, in {gathered.rows} rows: "
            "calibrate on more tokens, or leave it out of the targets"
        )
    by_grid: dict[Integers, list[tuple[fx.Node, str]]] = {}
    for node, (name, grid) in stage.sites.items():
        by_grid.setdefault(grid, []).append((node, name))
    results: dict[str, Quantized] = {}
    errors: dict[str, float] = {}
    for grid, members in by_grid.items():
        weights = [_weight(graph, node).to(hessian) for node, _ in members]
        try:
            stacked = gptq(torch.cat(weights), hessian, grid, damping, act_order)
        except PassError as error:
            raise PassError(f"{stage.names}: {error}") from error
        heights = [len(weight) for weight in weights]
        parts = (part.split(heights) for part in (stacked.integers, stacked.scale, stacked.zero))
        for (_, name), weight, *tensors in zip(members, weights, *parts, strict=True):
            # Copies: a part of a stack would keep all of it alive, and cannot be saved by itself.
            results[name] = Quantized(*(tensor.clone() for tensor in tensors))
            errors[name] = _relative_error(weight, results[name], hessian)
    return results, {
        "sites": {name: errors[name] for name, _ in stage.sites.values()},
        "tokens": gathered.rows,
        "dead_channels": int((hessian.diagonal() == 0).sum()),
        "solve": time.perf_counter() - start,
    }


def _weight(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """A linear's weight in float64, as FoldConstants would make it."""
    expression = node.args[1]
    assert isinstance(expression, fx.Node)
    return evaluate(graph, [expression])[0]


def _relative_error(weight: Tensor, quantized: Quantized, hessian: Tensor) -> float:
    """tr(ΔW·H·ΔWᵀ) / tr(W·H·Wᵀ): the squared change of the outputs, relative to the outputs squared."""
    rounded = dequantize(quantized.integers, quantized.scale, quantized.zero)
    lost, whole = (float(((w @ hessian) * w).sum()) for w in (rounded.to(weight.dtype) - weight, weight))
    return lost / whole if whole else 0.0


def _fingerprint(graph: fx.GraphModule, sites: Sites, tokens: Tensor, damping: float, act_order: bool) -> str:
    """A name for everything that decides the result: a run that differs in any of it has other files."""
    named = sorted((name, repr(grid)) for name, grid in sites.values())
    digest = hashlib.sha256(repr((graph_text(graph), named, damping, act_order)).encode())
    for tensor in (*parameters(graph).values(), tokens):
        digest.update(repr((tensor.dtype, tensor.shape)).encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _save(file: Path, results: Mapping[str, Quantized], row: Mapping[str, Any]) -> None:
    tensors = {
        f"{name}.{part}": value.cpu() for name, q in results.items() for part, value in vars(q).items()
    }
    with writing(file) as temporary:
        save_file(tensors, temporary, metadata={"figures": json.dumps(row)})


def _load(file: Path, stage: _Stage) -> tuple[dict[str, Quantized], dict[str, Any]] | None:
    """A stage that an earlier run finished; None if it is not there (any more), or damaged."""
    try:
        with safe_open(file, "pt") as saved:
            row = json.loads(saved.metadata()["figures"])
            parts = ("integers", "scale", "zero")
            return {
                name: Quantized(*(saved.get_tensor(f"{name}.{part}") for part in parts))
                for name, _ in stage.sites.values()
            }, row
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
