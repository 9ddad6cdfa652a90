"""What values are on data: running ranges of a value's channels, and the nodes that record them.

An observer is shown rows [n, channels]; a value as a whole is one channel. Minima and maxima are two lines,
and percentiles exact in bounded memory are not among torch's observers, so both are here. The range of
least squared error is `torch.ao.quantization.observer.HistogramObserver`: torch marks the workflows around
its observers deprecated in favour of torchao's, which holds a copy, but not the observers, and torchao is
an extra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import finish, get_tensor, is_op
from rolora_passes.quantize.stages import Stages, room_beside


class Observer(Protocol):
    """Takes in rows, and knows their range."""

    def see(self, rows: Tensor) -> None:
        """Take in rows [n, channels], n at least 1, all finite."""

    def range(self) -> tuple[Tensor, Tensor] | None:
        """Low and high, [channels] each; None if there were no rows."""


class MinMax:
    """The least and the greatest value of every channel."""

    def __init__(self) -> None:
        self._range: tuple[Tensor, Tensor] | None = None

    def see(self, rows: Tensor) -> None:
        low, high = rows.aminmax(dim=0)
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = low, high

    def range(self) -> tuple[Tensor, Tensor] | None:
        return self._range


class Percentile:
    """The (100 - p)th and the pth percentile of every channel: what `torch.quantile` says of all rows.

    Only the tails that can matter are kept: of n rows, the 1 + (1 - p/100)·n least and greatest. For that
    the number of times rows will be shown, as many as the first time, must be known.

    Args:
        percentile: p, from 50 to 100; 100 is `MinMax`.
        times: how often `see` will be called at most.
    """

    def __init__(self, percentile: float, times: int) -> None:
        self._beyond = 1 - percentile / 100
        self._times = times
        self._keep, self._count = 0, 0
        self._tails: list[Tensor] = []  # greatest first: of the rows, and of their negatives

    def see(self, rows: Tensor) -> None:
        columns = rows.T.contiguous()
        if not self._tails:
            self._keep = 2 + int(self._beyond * (self._times * rows.shape[0] - 1))
            self._tails = [columns[:, :0]] * 2
        self._count += rows.shape[0]
        for side, (tail, sign) in enumerate(zip(self._tails, (1, -1), strict=True)):
            new = columns if sign > 0 else -columns
            if tail.shape == (1, self._keep):  # nothing else can get in
                new = new[new > tail[0, -1]].unsqueeze(0)
            both = torch.cat((tail, new), dim=1)
            self._tails[side] = both.topk(min(self._keep, both.shape[1]), dim=1).values

    def range(self) -> tuple[Tensor, Tensor] | None:
        if not self._tails:
            return None
        place = self._beyond * (self._count - 1)
        first = int(place)
        second = min(first + 1, self._count - 1)
        wide = torch.promote_types(self._tails[0].dtype, torch.float32)
        tails = [tail.to(wide) for tail in self._tails]
        high, low = (torch.lerp(t[:, first], t[:, second], place - first) for t in tails)
        return -low, high


class Histogram:
    """The range, zero included, that loses least, squared, on a grid of 8 bits; of one channel.

    See `torch.ao.quantization.observer.HistogramObserver`: 2048 bins, stretched as the range grows.
    """

    def __init__(self) -> None:
        from torch.ao.quantization.observer import HistogramObserver

        self._observer: Any = HistogramObserver(dtype=torch.quint8)
        self._seen = False

    def see(self, rows: Tensor) -> None:
        self._observer.to(rows.device)(rows.float())
        self._seen = True

    def range(self) -> tuple[Tensor, Tensor] | None:
        if not self._seen:
            return None
        scale, zero = self._observer.calculate_qparams()
        low, high = ((step - zero) * scale for step in (0, 255))
        return low.reshape(1), high.reshape(1)


def watch(
    graph: fx.GraphModule,
    who: str,
    tokens: Tensor,
    sites: Mapping[fx.Node, str],
    see: Callable[[fx.Node, Tensor], None],
    on_progress: Callable[[str, int, int], None],
) -> None:
    """Run windows [N, S] in stages and show values, each for all windows; after the last nothing is computed.

    Args:
        who: the pass, for errors and progress.
        sites: the values to show, each with the name of a linear that reads it.
        see: called with a node and its value; not where it is empty.
        on_progress: see `Calibration`.

    Raises:
        PassError: a value that is NaN or infinite; names the site.
    """
    order, count = sorted(sites), len(tokens)
    stages = Stages(graph, tokens, room_beside(0, who)) if order else None
    for place, node in enumerate(order):
        assert stages is not None
        for number, value in enumerate(stages.advance(node)):
            if value.numel():
                _require_finite(value, f"{who}: the input of {sites[node]}", number)
                see(node, value)
            on_progress(who, place * count + number + 1, len(order) * count)


def _require_finite(value: Tensor, what: str, window: int) -> None:
    low, high = value.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise PassError(
            f"{what} is NaN or infinite in window {window} of the calibration "
            f"tokens (from {float(low):.3g} to {float(high):.3g}): calibrate in a wider type, or look "
            "for what produced it"
        )


def observations(graph: fx.GraphModule) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """What observers saw, by the value observed: low and high, [1] or [channels] each."""
    found: dict[fx.Node, tuple[Tensor, Tensor]] = {}
    for node in graph.graph.nodes:
        if is_op(node, "observed"):
            value, low, high = node.args
            found[value] = get_tensor(graph, low.target), get_tensor(graph, high.target)
    return found


def remove_observers(graph: fx.GraphModule) -> int:
    """Take every observer out of a graph, with its parameters; how many there were."""
    nodes = [n for n in graph.graph.nodes if is_op(n, "observed")]
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
    finish(graph)
    return len(nodes)
