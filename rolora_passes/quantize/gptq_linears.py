"""GPTQ over a graph: linears in its order, each on the inputs that the rounded ones before it make."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.evaluate import blocks
from rolora_passes.graphs.graph import constants
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.memory import peak_mb, release
from rolora_passes.numerics.affine import Integers, dequantize
from rolora_passes.numerics.gptq import Quantized, gptq
from rolora_passes.ondisk import Growing
from rolora_passes.quantize.stages import Stages, room_beside
from rolora_passes.quantize.work import keeping

Sites = Mapping[fx.Node, tuple[str, Integers]]
_AT_ONCE = 1 << 25  # elements of weights that are rounded in one go, or as many rows as the Hessian has


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
            goes on from there; None to keep nothing. Runs that differ in anything have files of their own.
            One process at a time works in it.
        on_progress: called with how much is done, and of how much.
        store: writes a weight into the graph: rewrites the linear's second argument.

    Returns: figures. "stages": for each, the "sites" with the relative error of their outputs
        (tr(ΔW·H·ΔWᵀ) / tr(W·H·Wᵀ)), how many "tokens" were seen, "dead_channels", seconds of the
        "forward" (with the Hessian) and of the "solve", whether it was "resumed", and the process's
        "peak_mb" so far.

    Raises:
        PassError: a weight cannot be rounded on what its input saw, or a stage needs more memory than there
            is (`ondisk.spilling`); names the sites.
        WorkError: another process works in the folder, or it cannot be written to.
    """
    plan, per_stage = _stages(sites), len(tokens) + 1
    figures, total = [], len(plan) * per_stage
    named = sorted((name, repr(grid)) for name, grid in sites.values())
    with keeping(work, graph, tokens, (named, damping, act_order)) as kept:
        windows = Stages(graph, tokens, _room(graph, plan, tokens.shape[1]))
        for number, stage in enumerate(plan):
            done, names = number * per_stage, [name for name, _ in stage.sites.values()]
            saved = kept.load(number, names)
            start = time.perf_counter()
            hessian = Hessian()
            for window, value in enumerate(windows.advance(stage.input)):
                if saved is None:
                    hessian.add(value)
                on_progress(done + window + 1, total)
            seconds = time.perf_counter() - start
            release()  # what windows freed lies in pieces, among which no matrix fits
            results, row = saved or _solve(graph, stage, hessian, damping, act_order)
            if saved is None:
                kept.save(number, results, row)
            for node, (name, grid) in stage.sites.items():
                store(node, results[name], grid)
            figures.append({**row, "forward": seconds, "resumed": saved is not None, "peak_mb": peak_mb()})
            on_progress(done + per_stage, total)
    return {"stages": figures}


def _room(graph: fx.GraphModule, plan: list[_Stage], length: int) -> int | None:
    """The bytes that windows may keep in memory beside the largest stage, of whose needs this is an estimate.

    Rounding holds the Hessian [n, n] in float32, three matrices of its size in float64, and some rows of the
    weights a few times over; running holds the Hessian, the weights, and a window's values beside them.
    """
    shapes, largest, names = infer_shapes(graph, only=constants(graph)), 0, ""
    for stage in plan:
        weights = [shapes[node.args[1]].shape for node in stage.sites if isinstance(node.args[1], fx.Node)]
        width, rows = int(weights[0][-1]), sum(int(shape[0]) for shape in weights)
        rounding = 28 * width**2 + 20 * width * min(rows, _rows_at_once(width))
        running = 4 * width**2 + 8 * width * min(rows, 8 * width) + 16 * length * max(width, rows // 4)
        if max(rounding, running) > largest:
            largest, names = max(rounding, running), stage.names
    return room_beside(largest, f"gptq of {names}")


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
        """[n, n]; None if no value came. It is the sum itself, not a copy."""
        if self._sum is None:
            return None
        for start in range(0, len(self._sum), 1024):
            here = slice(start, start + 1024)
            corner = self._sum[here, here].triu()
            self._sum[here, here] = corner + corner.triu(1).t()
            self._sum[here, :start] = self._sum[:start, here].t()
        return self._sum


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
    made = {name: _Made() for name, _ in stage.sites.values()}
    for grid, members in by_grid.items():
        for pieces in _pieces(graph, members, hessian, _rows_at_once(len(hessian))):
            weights = [weight for _, _, weight in pieces]
            try:
                stacked = gptq(torch.cat(weights), hessian, grid, damping, act_order)
            except PassError as error:
                raise PassError(f"{stage.names}: {error}") from error
            heights = [len(weight) for weight in weights]
            parts = (part.split(heights) for part in (stacked.integers, stacked.scale, stacked.zero))
            for (name, rows, weight), *tensors in zip(pieces, *parts, strict=True):
                made[name].append(rows, weight, Quantized(*tensors), hessian)
    return {name: one.finish() for name, one in made.items()}, {
        "sites": {name: one.lost / one.whole if one.whole else 0.0 for name, one in made.items()},
        "tokens": gathered.rows,
        "dead_channels": int((hessian.diagonal() == 0).sum()),
        "solve": time.perf_counter() - start,
    }


def _rows_at_once(width: int) -> int:
    return max(width, _AT_ONCE // width)


def _pieces(
    graph: fx.GraphModule, members: list[tuple[fx.Node, str]], like: Tensor, most: int
) -> Iterator[list[tuple[str, int, Tensor]]]:
    """The weights of linears as FoldConstants would make them, in float64, cast, and moved; rows by rows.

    Yields: (linear, how many rows it has, some of them) for at most so many rows.
    """
    found, height = list[tuple[str, int, Tensor]](), 0
    for node, name in members:
        expression = node.args[1]
        assert isinstance(expression, fx.Node)
        for place, (part,) in blocks(graph, [expression], torch.float64):
            for piece in part.to(like).split(most):
                if height + len(piece) > most:
                    yield found
                    found, height = [], 0
                found.append((name, place.count, piece))
                height += len(piece)
    yield found


class _Made:
    """A weight that is rounded rows by rows, and Σ tr(ΔW·H·ΔWᵀ) and Σ tr(W·H·Wᵀ): the squared change of its
    outputs, and the outputs squared."""

    def __init__(self) -> None:
        self.lost, self.whole = 0.0, 0.0
        self._parts: list[Growing] = []

    def append(self, count: int, weight: Tensor, quantized: Quantized, hessian: Tensor) -> None:
        """The next rows, of so many, as they were and as they are."""
        tensors = [*vars(quantized).values()]
        if not self._parts:
            self._parts = [Growing((count, t.shape[1]), t.dtype) for t in tensors]
        for growing, tensor in zip(self._parts, tensors, strict=True):
            growing.append(tensor)
        rounded = dequantize(quantized.integers, quantized.scale, quantized.zero).to(weight.dtype)
        self.lost += _squared(rounded - weight, hessian)
        self.whole += _squared(weight, hessian)

    def finish(self) -> Quantized:
        return Quantized(*(part.finish() for part in self._parts))


def _squared(weight: Tensor, hessian: Tensor) -> float:
    """tr(W·H·Wᵀ) for a symmetric H, of which the upper triangle is read."""
    total, width = 0.0, len(hessian)
    step = max(256, -(-width // 6))
    for start in range(0, width, step):
        here = slice(start, start + step)
        product = weight[:, here] @ hessian[here, here]
        if start:
            product.addmm_(weight[:, :start], hessian[:start, here], alpha=2)
        total += float((product * weight[:, here]).sum())
    return total
