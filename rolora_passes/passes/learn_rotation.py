"""LearnRotation: train the rotations and scales that a graph leaves open, under the quantizers to come."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.bases.inference import infer_bases
from rolora_passes.graphs.bases.rotations import check_orthogonal, dense, keep_rotation
from rolora_passes.graphs.folding import fold
from rolora_passes.graphs.graph import copy_graph, get_tensor, is_op, parameters, set_tensor, upstream
from rolora_passes.graphs.info import Rotation, info
from rolora_passes.graphs.sites import matches
from rolora_passes.learning import processes
from rolora_passes.learning.distributions import DISTRIBUTIONS
from rolora_passes.learning.layer_by_layer import Learned, learn_each
from rolora_passes.learning.samples import find_sites, turned_by
from rolora_passes.memory import peak_mb
from rolora_passes.numerics.stiefel import RATES, Method, Variables
from rolora_passes.passes.base import Calibration, Report
from rolora_passes.passes.training import Training


@dataclass(frozen=True)
class LearnRotation(Training):
    """Train the matrices of rotate and of insert-hadamard's factors, and the scales of insert-scaling.

    Before:                                  After:
        y = linear(n, rotate(W, R1, 1))          the same, R1 another orthogonal matrix

    The graph is as exact as before; what changes is what quantizers make of it. There are two ways:

    - End to end (loss "distillation" or "cross-entropy"): a copy is given the quantizers, with gradients
      straight through them, and the loss of that copy on the calibration tokens is made less (SpinQuant, Liu
      et al., 2024).
    - Layer by layer (loss "whip", DartQuant, Shao et al., 2025, or "kurtosis", KurTail, Akhondzadeh et al.,
      2025): each matrix of rotate is learned alone, from a sample of what linears read in its basis, to make
      the values of a token as even as a rotation can. The model runs forward once, in stages, with no
      quantizer in it; there is no backward pass through it. R1 sees the sites of all layers, R2 those of its
      own. Factors and scales are left.

    It stands before fold-constants: after that no rotation is left.

    Options, beside those of every pass that trains:
        under: if GPTQ will round the weights, use a setting that leaves them ("W16A4KV4"). End to end only,
            as are bfloat16, recompute, shard and scale_lr.
        loss: see above; "whip" is the mean over tokens of the sum of exp(-|x|) over channels, "kurtosis" that
            of |kurtosis - 1.8|, which is 0 for a uniform distribution.
        steps, batch: of every matrix; a batch is what was sampled of so many windows.
        train: "all", or patterns over the keys of the manifest: "R1", "R2", "R3", "R4", "scale", "re:…".
        method: "cayley-adam": Adam on the skew-symmetric matrix of a Cayley transform; "cayley-sgd":
            SpinQuant's; "qr-sgd": DartQuant's, SGD with momentum 0.9 on a matrix of which the rotation is the
            orthogonal factor.
        lr: learning rate of the matrices; None: 2e-3 for Adam, 1.5 for Cayley SGD, 1e-2 for QR.
        scale_lr: learning rate of the logarithms of scales.
        tokens: how many to sample at each site, in equal parts from all windows (layer by layer).
        seed: of that sample.

    Raises:
        PassError: nothing to train; what every pass that trains raises.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    forbids: ClassVar[tuple[str, ...]] = ("weights quantized", "activations quantized", "cache quantized")

    losses: ClassVar[tuple[str, ...]] = (*Training.losses, *DISTRIBUTIONS)

    train: str | tuple[str, ...] = "all"
    method: Method = "cayley-adam"
    lr: float | None = None
    scale_lr: float = 1e-2
    tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise PassError(f"{self.name}: expected a method of {get_args(Method)}, found {self.method!r}")
        if self.tokens < 1:
            raise PassError(f"{self.name}: tokens must be 1 or more, found {self.tokens}")
        super().__post_init__()

    def optimizers(self, variables: Variables) -> list[torch.optim.Optimizer]:
        return variables.optimizers(RATES[self.method] if self.lr is None else self.lr, self.scale_lr)

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        alone = self.loss in DISTRIBUTIONS
        self._require(graph, decoder=not alone)
        report = Report()
        entries = self._chosen(graph, report)
        learn = self._layer_by_layer if alone else self._end_to_end
        found = learn(graph, entries, calibration, report)
        learned = {key: entry for key, entry in entries.items() if entry.tensor in found}
        self._close(graph, learned, found)
        report.changed = list(learned)
        report.moved = _moved(graph, set(found))
        return report

    def _end_to_end(
        self, graph: fx.GraphModule, entries: dict[str, Rotation], calibration: Calibration, report: Report
    ) -> dict[str, Tensor]:
        """What all of them are, by parameter, after training under the quantizers to come."""
        variables = Variables(*self._open(graph, entries), self.method)
        student = self._under(graph, calibration.tokens)
        teacher = None if self.loss == "cross-entropy" else copy_graph(graph)
        if teacher is not None:
            fold(teacher)
        report.notes = self._train(graph, student, teacher, variables, calibration)
        report.notes["orthogonality_error"] = variables.orthogonality_error()
        return dict(zip(variables.names, variables(), strict=True))

    def _layer_by_layer(
        self, graph: fx.GraphModule, entries: dict[str, Rotation], calibration: Calibration, report: Report
    ) -> dict[str, Tensor]:
        """What the matrices of basis classes are, by parameter, each learned from what linears read."""
        began, bases = time.perf_counter(), infer_bases(graph)
        keys = {entry.tensor: key for key, entry in entries.items()}
        classes = {c: keys[name] for c in bases.classes if (name := turned_by(c)) in keys}
        sites = find_sites(graph, bases, classes)
        read = {classes[site.cls] for site in sites}
        report.left += [(key, _why(key, classes.values())) for key in entries if key not in read]
        if not read:
            raise PassError(
                f"{self.name}: loss {self.loss} is of what linears read in the bases that rotate turned, and "
                f"none reads in those of {list(entries)[:6]}"
            )
        starts = {cls: dense(get_tensor(graph, entries[key].tensor).detach()) for cls, key in classes.items()}
        state = self._states(graph, calibration)
        tokens, tell = calibration.tokens, calibration.on_progress
        learned = {
            classes[cls]: found
            for cls, found in learn_each(
                graph, sites, starts, tokens, self, lambda cls: state(classes[cls]), tell
            )
        }
        report.notes = {**_account(learned), "seconds": round(time.perf_counter() - began, 1)}
        return {entries[key].tensor: found.matrix for key, found in learned.items()}

    def _states(self, graph: fx.GraphModule, calibration: Calibration) -> Callable[[str], Path | None]:
        """The file that keeps the state of a matrix's training, by its key."""
        if calibration.work is None:
            return lambda key: None
        file = calibration.work / self._file(graph, self.windows(calibration))
        return lambda key: file.with_name(f"{file.stem}-{key}.pt")

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


def _why(key: str, classes: Collection[str]) -> str:
    return "no linear reads in its basis" if key in classes else "learned end to end alone"


def _account(learned: dict[str, Learned]) -> dict[str, Any]:
    """For a report: the mean loss of the matrices at every step, and the first and last of each."""
    losses = {key: found.trace.losses for key, found in learned.items()}
    steps = zip_longest(*losses.values())
    return {
        "losses": [fmean(loss for loss in step if loss is not None) for step in steps],
        "matrices": {key: [values[0], values[-1]] for key, values in losses.items()},
        "orthogonality_error": max(found.error for found in learned.values()),
        "peak_mb": peak_mb(),
        "processes": processes.count(),
    }


def _is_scale(key: str) -> bool:
    return key.endswith(".scale")


def _moved(graph: fx.GraphModule, trained: set[str]) -> set[str]:
    """Names of values that stand in a basis that was trained."""
    moved = {n.name for n in graph.graph.nodes if is_op(n, "rotate", "kronecker")}
    for cls in infer_bases(graph).classes:
        if any(n.target in trained for n in upstream(axis.node for axis in cls.parameters)):
            moved |= {node.name for node, _ in cls.values}
    return moved
