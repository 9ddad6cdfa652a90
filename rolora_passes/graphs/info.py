"""What a graph carries beside its nodes and tensors: one typed record, `GraphInfo`.

It is frozen and shared between copies. `set_info` gives a graph another one; nothing else writes
`graph.meta`. `save_graph` writes all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

if TYPE_CHECKING:
    from rolora_passes.graphs.axis_maps import Way

_KEY = "rolora_passes"


@dataclass
class Report:
    """What a pass did.

    Attributes:
        changed: sites it rewrote.
        left: sites it could have rewritten and did not, each with the reason.
        moved: names of values that stand in another basis afterwards, so a comparison skips them.
        notes: figures worth printing.
    """

    changed: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        """Whether the graph is any different."""
        return bool(self.changed)


@dataclass
class Record:
    """What one pass did, what it cost, and how far the function moved.

    Attributes:
        kind: "exact", "lossy" or "trained".
        seconds: of the pass itself; verification apart.
        peak_mb: the process's peak memory so far, in MB.
        nodes: graph nodes before and after.
        error: largest difference of the logits, relative to the largest logit; None if not verified.
    """

    name: str
    options: dict[str, Any]
    kind: str
    seconds: float
    verify_seconds: float
    peak_mb: float
    nodes: tuple[int, int]
    report: Report
    error: float | None

    def __str__(self) -> str:
        """A line for a log."""
        options = ", ".join(f"{key}={value!r:.80}" for key, value in self.options.items())
        exact = (
            "" if self.error is None else f", same function to {self.error:.0e} ({self.verify_seconds:.1f} s)"
        )
        sites = f"{len(self.report.changed)} sites" if self.report.changed else "no site found"
        return (
            f"{self.name}({options}): {sites}, {len(self.report.left)} left, "
            f"{self.seconds:.2f} s, peak {self.peak_mb:.0f} MB, {self.nodes[0]} nodes before and "
            f"{self.nodes[1]} after{exact}"
        )

    def row(self) -> dict[str, Any]:
        """A JSON-able summary: all but the values that moved."""
        known = asdict(self)
        known["options"] = {name: _plain(value) for name, value in self.options.items()}
        del known["report"]["moved"]
        return known

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes an equal record of, if its options are plain."""
        known = self.row()
        known["report"]["moved"] = sorted(self.report.moved)
        return known

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> Record:
        """The record that `to_json` described."""
        report = Report(**known["report"])
        report.left = [(str(site), str(reason)) for site, reason in report.left]
        report.moved = set(report.moved)
        before, after = known["nodes"]
        return cls(**{**known, "nodes": (before, after), "report": report})


def _plain(value: Any) -> Any:
    """An option as JSON has it: a file by its name, tensors by their keys."""
    if isinstance(value, Path):
        return value.as_posix()
    return list(value) if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class Rotation:
    """A change of basis, or of scale, that a graph has been given.

    Attributes:
        method: how the matrix came about: "hadamard", "orthogonal", "given", "learned", "balanced", "ones".
        tensor: the parameter it was written as; gone once it is folded.
        matrix: signs [n] of a randomised Hadamard, a dense matrix [n, n], or scales [n]; float64.
        about: what else the manifest says: seed, construction, the basis class, its parameters.
    """

    method: str
    tensor: str
    matrix: Tensor = field(repr=False, compare=False)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Channels."""
        return len(self.matrix)

    def entry(self) -> dict[str, Any]:
        """Its entry in `rotations.json`: everything but the matrix."""
        return {"size": self.size, "method": self.method, **self.about, "tensor": self.tensor}

    @classmethod
    def of(cls, entry: Mapping[str, Any], matrix: Tensor) -> Rotation:
        """The rotation that `entry` described."""
        about = {k: v for k, v in entry.items() if k not in ("size", "method", "tensor")}
        return cls(str(entry["method"]), str(entry["tensor"]), matrix, about)


@dataclass(frozen=True)
class GraphInfo:
    """What a graph carries beside its nodes and tensors.

    Attributes:
        config: the model's configuration, as far as lowering and reports need it.
        weights: a hash of every parameter that was captured, by name (`graphs.identity`).
        tied: other names of tied parameters, each with the name that the graph has for it.
        replaced: parameters that an adapter brought with it.
        rotations: by SpinQuant's key, or the name of the basis class.
        ways: what was folded into a parameter, by its name (`graphs.lineage`).
        cached: tokens that its caches hold, and that one call may have; None without caches.
        history: a record for every pass, the oldest first.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    rotations: Mapping[str, Rotation] = field(default_factory=dict)
    ways: Mapping[str, Way] = field(default_factory=dict)
    cached: tuple[int, int] | None = None
    history: tuple[Record, ...] = ()

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows, if its configuration says so."""
        return self.config.get("vocab_size")


def info(graph: fx.GraphModule) -> GraphInfo:
    """What a graph carries."""
    found: GraphInfo = graph.meta.get(_KEY, GraphInfo())
    return found


def set_info(graph: fx.GraphModule, known: GraphInfo | None = None, **changes: Any) -> None:
    """Give a graph another record: the one it has, or `known`, with some fields changed."""
    graph.meta[_KEY] = dataclasses.replace(info(graph) if known is None else known, **changes)


def history(graph: fx.GraphModule) -> list[Record]:
    """The records of every pass applied to a graph, oldest first."""
    return list(info(graph).history)
