"""LearnRotation: train the rotations and scales that a graph leaves open, under the quantizers to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.bases.inference import infer_bases
from rolora_passes.graphs.bases.rotations import check_orthogonal, dense, keep_rotation
from rolora_passes.graphs.folding import fold
from rolora_passes.graphs.graph import copy_graph, get_tensor, is_op, parameters, set_tensor, upstream
from rolora_passes.graphs.info import Rotation, info
from rolora_passes.graphs.sites import matches
from rolora_passes.numerics.stiefel import RATES, Method, Variables
from rolora_passes.passes.base import Calibration, Report
from rolora_passes.passes.training import Training


@dataclass(frozen=True)
class LearnRotation(Training):
    """Train the matrices of rotate and of insert-hadamard's factors, and the scales of insert-scaling.

    Before:                                  After:
        y = linear(n, rotate(W, R1, 1))          the same, R1 another orthogonal matrix

    The graph is as exact as before; what changes is what quantizers make of it. A copy is given these
    quantizers, with gradients straight through them, and the loss of that copy on the calibration tokens is
    made less (SpinQuant, Liu et al., 2024). It stands before fold-constants: after that no rotation is left.

    Options, beside those of every pass that trains:
        under: if GPTQ will round the weights, use a setting that leaves them ("W16A4KV4").
        train: "all", or patterns over the keys of the manifest: "R1", "R2", "R3", "R4", "scale", "re:…".
        method: "cayley-adam": Adam on the skew-symmetric matrix of a Cayley transform; "cayley-sgd":
            SpinQuant's.
        lr: learning rate of the matrices; None: 2e-3 for Adam, 1.5 for SGD.
        scale_lr: learning rate of the logarithms of scales.

    Raises:
        PassError: nothing to train; what every pass that trains raises.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    forbids: ClassVar[tuple[str, ...]] = ("weights quantized", "activations quantized", "cache quantized")

    train: str | tuple[str, ...] = "all"
    method: Method = "cayley-adam"
    lr: float | None = None
    scale_lr: float = 1e-2

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise PassError(f"{self.name}: expected a method of {get_args(Method)}, found {self.method!r}")
        super().__post_init__()

    def optimizers(self, variables: Variables) -> list[torch.optim.Optimizer]:
        return variables.optimizers(RATES[self.method] if self.lr is None else self.lr, self.scale_lr)

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        self._require(graph)
        report = Report()
        entries = self._chosen(graph, report)
        variables = Variables(*self._open(graph, entries), self.method)
        student = self._under(graph, calibration.tokens)
        alone = self.loss == "cross-entropy"
        teacher = None if alone else copy_graph(graph)
        if teacher is not None:
            fold(teacher)
        report.notes = self._train(graph, student, teacher, variables, calibration)
        report.notes["orthogonality_error"] = variables.orthogonality_error()
        self._close(graph, entries, dict(zip(variables.names, variables(), strict=True)))
        report.changed = list(entries)
        report.moved = _moved(graph, set(variables.names))
        return report

    def _chosen(self, graph: fx.GraphModule, report: Report) -> dict[str, Rotation]:
        """The manifest's entries to train, those whose parameter is still in the graph."""
        there = parameters(graph)
        open_ = {key: known for key, known in info(graph).rotations.items() if known.tensor in there}
        if not open_:
            raise PassError(
                f"{self.name}: expected rotations or scales that are not folded yet, found none: run rotate, "
                "insert-hadamard with factors: true, or insert-scaling first, and fold-constants after this"
            )
        chosen = {k: e for k, e in open_.items() if self.train == "all" or matches(k, self.train)}
        report.left += [(key, "not trained by the options") for key in open_ if key not in chosen]
        if not chosen:
            raise PassError(
                f"{self.name}: nothing matches train: {self.train!r}; there are {list(open_)[:6]}"
            )
        return chosen

    def _open(
        self, graph: fx.GraphModule, entries: dict[str, Rotation]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Start values by parameter: dense matrices, and logarithms of scales."""
        rotations, scales = {}, {}
        for key, entry in entries.items():
            value = get_tensor(graph, entry.tensor).detach()
            if _is_scale(key):
                scales[entry.tensor] = value
            else:
                rotations[entry.tensor] = dense(value)
        return rotations, scales

    def _close(self, graph: fx.GraphModule, entries: dict[str, Rotation], found: dict[str, Tensor]) -> None:
        """Put what was learned into the graph and its manifest, matrices made orthogonal to float64."""
        for key, entry in entries.items():
            value, old = found[entry.tensor].detach().cpu(), get_tensor(graph, entry.tensor)
            value = value if _is_scale(key) else check_orthogonal(value, len(value), key)
            set_tensor(graph, entry.tensor, value.to(old))
            value = value.double().exp() if _is_scale(key) else value
            began = {"began": entry.method} if entry.method != "learned" else {}
            learned = Rotation("learned", entry.tensor, value, {**entry.about, **began})
            keep_rotation(graph, key, learned)


def _is_scale(key: str) -> bool:
    return key.endswith(".scale")


def _moved(graph: fx.GraphModule, trained: set[str]) -> set[str]:
    """Names of values that stand in a basis that was trained."""
    moved = {n.name for n in graph.graph.nodes if is_op(n, "rotate", "kronecker")}
    for cls in infer_bases(graph).classes:
        if any(n.target in trained for n in upstream(axis.node for axis in cls.parameters)):
            moved |= {node.name for node, _ in cls.values}
    return moved
