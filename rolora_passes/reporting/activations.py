"""Statistics of what linears and norms read, from one run of a graph: surfaces, channels, outliers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.debugging.pairing import layers_of, sites_of
from rolora_passes.graphs.graph import constants, is_op, linears
from rolora_passes.graphs.running import values
from rolora_passes.graphs.sites import is_head
from rolora_passes.reporting.arrays import Arrays, bounds

COLUMNS = 256  # columns of a picture
_ROWS = 128  # rows of a picture, at most
_BYTES = 3_000_000  # all pictures together, before compression


@dataclass(frozen=True)
class Site:
    """A value that gets a picture.

    Attributes:
        kind: what it is, judged by its inputs and its readers.
        layer: the number of its decoder layer; None outside of them.
        number: its index among the values of this kind in the layer (experts), in graph order.
        readers: the linears that read it or, for the residual stream, its norm.
    """

    kind: str
    layer: int | None
    number: int
    readers: tuple[str, ...] = field(compare=False)


@dataclass(frozen=True)
class Outliers:
    """Statistics of a value [S, n]; all except `first` leave out the first token, an attention sink.

    Attributes:
        channels: n.
        first: largest magnitude in the first token.
        kurtosis: over all elements, each about its token's mean; 3 for a Gaussian.
        peak: median over tokens of max|x| / median|x|.
        channel_max: largest magnitude by channel, max-pooled to [columns].
        channel_kurtosis: kurtosis over tokens by channel, max-pooled to [columns].
        surface: magnitudes, tokens and channels max-pooled to [rows, columns].
    """

    channels: int
    first: float
    kurtosis: float
    peak: float
    channel_max: Tensor
    channel_kurtosis: Tensor
    surface: Tensor


def activation_sites(graph: fx.GraphModule) -> dict[fx.Node, Site]:
    """The residual stream where norms read it, and every value that linears read."""
    names, known = sites_of(graph), constants(graph)
    layers, origins, attended = layers_of(graph, names), _origins(graph), _reaches_attention(graph)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for linear in linears(graph):
        readers.setdefault(linear.args[0], []).append(linear)  # type: ignore[arg-type]
    found: dict[fx.Node, Site] = {}
    counts: Counter[tuple[str, int | None]] = Counter()

    def add(value: fx.Node, kind: str, users: list[fx.Node]) -> None:
        layer = layers.get(users[0])
        if value not in found:  # two norms may read one value
            found[value] = Site(kind, layer, counts[kind, layer], tuple(names[u.name] for u in users))
            counts[kind, layer] += 1

    for value, users in readers.items():
        kind = _kind(value, users, origins, attended)
        norm = _norm_behind(value, known)
        if norm is not None and "residual" in origins[norm.args[0]]:  # type: ignore[index]
            add(norm.args[0], f"residual stream, before {kind}", users)  # type: ignore[arg-type]
        add(value, f"{kind} input", users)
    return found


def _kind(
    value: fx.Node,
    readers: list[fx.Node],
    origins: Mapping[fx.Node, set[str]],
    attended: set[fx.Node],
) -> str:
    if any(is_head(reader) for reader in readers):
        return "head"
    if not attended.isdisjoint(readers):
        return "attention"
    if "attention" in origins[value]:
        return "output projection"
    return "MLP" if "residual" in origins[value] else "down projection"


def _origins(graph: fx.GraphModule) -> dict[fx.Node, set[str]]:
    """What every value is computed from, looking back as far as linears and attention."""
    origins: dict[fx.Node, set[str]] = {}
    for node in graph.graph.nodes:
        if is_op(node, "embedding"):
            origins[node] = {"residual"}
        elif is_op(node, "attention"):
            origins[node] = {"attention"}
        elif is_op(node, "linear"):
            origins[node] = {"linear"}
        else:
            origins[node] = {origin for operand in node.all_input_nodes for origin in origins[operand]}
    return origins


def _reaches_attention(graph: fx.GraphModule) -> set[fx.Node]:
    """Values that attention reads through anything but a linear."""
    found: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        if any(is_op(u, "attention") or (u in found and not is_op(u, "linear")) for u in node.users):
            found.add(node)
    return found


def _norm_behind(value: fx.Node, known: set[fx.Node]) -> fx.Node | None:
    """The norm that a value comes from, apart from its gain, its bias, an observer and a quantizer."""
    if is_op(value, "rms_norm", "layer_norm"):
        norm: fx.Node = value
        return norm
    operands = [a for a in value.all_input_nodes if a not in known]
    if len(operands) != 1 or is_op(value, "linear", "embedding"):
        return None
    return _norm_behind(operands[0], known)


def picture_rows(sites: int, tokens: int) -> int:
    """Rows per picture that keep all pictures of a page within `_BYTES`."""
    return max(8, min(_ROWS, tokens, _BYTES // max(1, sites * COLUMNS)))


def measure(graph: fx.GraphModule, tokens: Tensor, rows: int) -> dict[Site, Outliers]:
    """Run a graph once on tokens int64 [1, S] and summarise its sites; no value is kept."""
    sites, found = activation_sites(graph), {}
    for node, value in values(graph, tokens):
        if node in sites and value.numel() > 2 * value.shape[-1]:
            found[sites[node]] = _sum_up(value.reshape(-1, value.shape[-1]), rows)
    return found


def _sum_up(x: Tensor, rows: int) -> Outliers:
    later, columns = x[1:].double(), min(COLUMNS, x.shape[-1])
    magnitude = later.abs()
    peaks = magnitude.amax(-1) / magnitude.median(-1).values
    return Outliers(
        x.shape[-1],
        float(x[0].abs().max()),
        float(kurtosis(later, -1)),
        float(peaks.median()),
        _pooled(magnitude.amax(0), columns),
        _pooled(_by_channel(later), columns),
        torch.nn.functional.adaptive_max_pool2d(magnitude.float()[None], (min(rows, len(later)), columns))[0],
    )


def kurtosis(x: Tensor, dim: int) -> Tensor:
    """E x⁴ / (E x²)² over all elements, centred along `dim`; 3 for a Gaussian."""
    centred = x - x.mean(dim, keepdim=True)
    return (centred**4).mean() / (centred**2).mean() ** 2


def _by_channel(x: Tensor) -> Tensor:
    """The kurtosis of each channel over tokens [S, n]; 0 for a constant channel."""
    square = (x - x.mean(0)) ** 2
    return ((square**2).mean(0) / square.mean(0) ** 2).nan_to_num(nan=0.0)


def _pooled(channels: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.adaptive_max_pool1d(channels.float()[None], columns)[0]


def describe(
    before: Mapping[Site, Outliers], after: Mapping[Site, Outliers], arrays: Arrays
) -> list[dict[str, Any]]:
    """Every site for the page: its figures, and its pictures before and after on one scale.

    `after` is empty if a recipe changes nothing before it quantizes; otherwise only sites of both are shown.
    """
    found = []
    for site in before if not after else [site for site in after if site in before]:
        states = {name: by[site] for name, by in (("before", before), ("after", after)) if by}
        scales = {
            part: bounds(torch.cat([getattr(s, part).flatten() for s in states.values()]), below)
            for part, below in (("surface", 0.02), ("channel_max", 0.0), ("channel_kurtosis", 0.0))
        }
        entry: dict[str, Any] = {"kind": site.kind, "layer": site.layer, "readers": site.readers}
        for name, state in states.items():
            entry["channels"] = state.channels
            entry[name] = {"kurtosis": state.kurtosis, "peak": state.peak, "first": state.first}
            for part, (low, high) in scales.items():
                entry[name][part] = arrays.logarithmic(getattr(state, part), low, high)
        found.append(entry)
    return found


def headline(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind of site: median and largest kurtosis, and the median of max/median."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for site in sites:
        kinds.setdefault(site["kind"], []).append(site)
    return [
        {"kind": kind, "sites": len(of)}
        | {name: _typical([site[name] for site in of]) for name in ("before", "after") if name in of[0]}
        for kind, of in kinds.items()
    ]


def _typical(states: list[dict[str, float]]) -> dict[str, float]:
    kurtoses = [state["kurtosis"] for state in states]
    return {
        "kurtosis": median(kurtoses),
        "worst": max(kurtoses),
        "peak": median(state["peak"] for state in states),
    }
