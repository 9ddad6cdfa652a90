"""LearnRotation: train the rotations and scales that a graph leaves open, under the quantizers to come."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.fold_constants import FoldConstants
from rolora_passes.graphs.accounting import peak_mb
from rolora_passes.graphs.bases import infer_bases
from rolora_passes.graphs.graph import get_tensor, is_op, parameters, set_tensor, upstream
from rolora_passes.graphs.inputs import require_decoder
from rolora_passes.graphs.quantizers import require_float32, straighten
from rolora_passes.graphs.rotations import check_orthogonal, dense
from rolora_passes.graphs.sites import matches
from rolora_passes.graphs.split import LayeredGraph
from rolora_passes.graphs.text import graph_text
from rolora_passes.learning import processes
from rolora_passes.learning.stiefel import Method, Variables
from rolora_passes.learning.training import train
from rolora_passes.manager import apply_passes
from rolora_passes.passes import Calibration, Pass, Report
from rolora_passes.quantize_weights import QuantizeWeights
from rolora_passes.registry import make_pass
from rolora_passes.settings import Setting, quantizers

_LOSSES = ("cross-entropy", "distillation")


@dataclass(frozen=True)
class LearnRotation(Pass):
    """Train the matrices of rotate and of insert-hadamard's factors, and the scales of insert-scaling.

    Before:                                  After:
        y = linear(n, rotate(W, R1, 1))          the same, R1 another orthogonal matrix

    The graph is as exact as before; what changes is what quantizers make of it. A copy is given these
    quantizers, with gradients straight through them, and the loss of that copy on the calibration tokens is
    made less (SpinQuant, Liu et al., 2024). It stands before fold-constants: after that no rotation is left.

    Options:
        under: the quantizers while training: a setting ("W16A4KV4", where GPTQ will see to the weights), or
            a list of passes. GPTQ is taken as rounding to nearest; a clip search is coarser.
        train: "all", or patterns over the keys of the manifest: "R1", "R2", "R3", "R4", "scale", "re:…".
        method: "cayley-adam": Adam on the skew-symmetric matrix of a Cayley transform; "cayley-sgd":
            SpinQuant's.
        loss: "cross-entropy" of the next token, or "distillation": KL from what the graph computes in float.
        steps, batch: batches of that many windows, in their order.
        accumulate: parts of a batch that are computed one after another, to need less memory.
        lr, scale_lr: of matrices (None: 2e-3 for Adam, 1.5 for SGD) and of scales' logarithms; both fall to
            zero along a cosine.
        clip: the largest norm of the gradient.
        bfloat16: compute in bfloat16 where torch's autocast does; matrices stay float32.
        recompute: keep what passes between layers, and compute the rest again (activation checkpointing).
        shard: divide the layers' weights between the processes of torchrun.

    Raises:
        PassError: nothing to train, windows that do not divide among processes, or a loss that is not finite.
    """

    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    forbids: ClassVar[tuple[str, ...]] = ("weights quantized", "activations quantized", "cache quantized")

    under: str | tuple[Any, ...] = "W4A4KV4"
    train: str | tuple[str, ...] = "all"
    method: Method = "cayley-adam"
    loss: str = "distillation"
    steps: int = 100
    batch: int = 8
    accumulate: int = 1
    lr: float | None = None
    scale_lr: float = 1e-2
    clip: float = 1.0
    bfloat16: bool = False
    recompute: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if self.method not in get_args(Method) or self.loss not in _LOSSES:
            raise PassError(
                f"{self.name}: expected a method of {get_args(Method)} and a loss of {_LOSSES}, "
                f"found {self.method!r} and {self.loss!r}"
            )
        for option in ("steps", "batch", "accumulate"):
            if getattr(self, option) < 1:
                raise PassError(f"{self.name}: {option} must be 1 or more, found {getattr(self, option)}")
        for option in ("lr", "scale_lr", "clip"):
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise PassError(f"{self.name}: {option} must be above 0, found {value}")
        self._quantizers()

    @property
    def needs_calibration(self) -> bool:
        return True

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        require_float32(graph, self.name)
        require_decoder(graph, self.name)
        processes.join()
        self._require_divisible()
        report = Report()
        entries = self._chosen(graph, report)
        rotations, scales = self._open(graph, entries)
        variables = Variables(rotations, scales, self.method)
        file = None if calibration.work is None else calibration.work / self._file(graph, calibration.tokens)
        trace = train(
            self._student(graph, variables.names, calibration.tokens),
            self._teacher(graph) if self.loss == "distillation" else None,
            variables,
            calibration.tokens,
            self,
            file,
            calibration.on_progress,
        )
        error = variables.orthogonality_error()
        self._close(graph, entries, dict(zip(variables.names, variables(), strict=True)))
        report.changed = list(entries)
        report.moved = _moved(graph, set(variables.names))
        report.notes = {
            "losses": trace.losses,
            "seconds": round(trace.seconds, 1),
            "orthogonality_error": error,
            "peak_mb": peak_mb(),
            "processes": processes.count(),
        }
        return report

    def _quantizers(self) -> list[Pass]:
        """What rounds while training: as the options say, GPTQ's weights to nearest, nothing folded."""
        if isinstance(self.under, str):
            steps = quantizers(Setting.parse(self.under), "rtn")
        else:
            steps = [make_pass(spec) for spec in self.under]
        return [_to_nearest(step) for step in steps if not isinstance(step, FoldConstants)]

    def _require_divisible(self) -> None:
        if self.batch % (processes.count() * self.accumulate):
            raise PassError(
                f"{self.name}: expected a batch that {processes.count()} processes times {self.accumulate} "
                f"parts divide, found {self.batch}"
            )

    def _chosen(self, graph: fx.GraphModule, report: Report) -> dict[str, dict[str, Any]]:
        """The manifest's entries to train, those whose parameter is still in the graph."""
        known, there = graph.meta.get("rotations", {}), parameters(graph)
        open_ = {key: entry for key, entry in known.items() if entry.get("tensor") in there}
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
        self, graph: fx.GraphModule, entries: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Start values by parameter: dense matrices, and logarithms of scales."""
        rotations, scales = {}, {}
        for key, entry in entries.items():
            value = get_tensor(graph, entry["tensor"]).detach()
            if _is_scale(key):
                scales[entry["tensor"]] = value
            else:
                rotations[entry["tensor"]] = dense(value)
        return rotations, scales

    def _close(
        self, graph: fx.GraphModule, entries: dict[str, dict[str, Any]], found: dict[str, Tensor]
    ) -> None:
        """Put what was learned into the graph and its manifest, matrices made orthogonal to float64."""
        for key, entry in entries.items():
            value, old = found[entry["tensor"]].detach(), get_tensor(graph, entry["tensor"])
            value = value if _is_scale(key) else check_orthogonal(value, len(value), key)
            set_tensor(graph, entry["tensor"], value.to(old.dtype))
            value = value.double().exp() if _is_scale(key) else value
            began = {"began": entry["method"]} if entry["method"] != "learned" else {}
            graph.meta["rotations"][key] = {**entry, **began, "method": "learned"}
            graph.meta["rotation_tensors"][key] = value

    def _student(self, graph: fx.GraphModule, variables: list[str], tokens: Tensor) -> LayeredGraph:
        twin = apply_passes(graph, self._quantizers(), verify=False, calibration=tokens)
        straighten(twin)
        return self._layered(twin, variables)

    def _teacher(self, graph: fx.GraphModule) -> LayeredGraph:
        return self._layered(apply_passes(graph, [FoldConstants()], verify=False), [])

    def _layered(self, graph: fx.GraphModule, variables: list[str]) -> LayeredGraph:
        layered = LayeredGraph(graph, variables)
        if self.shard and processes.count() > 1:
            processes.shard(layered)
        return layered

    def _file(self, graph: fx.GraphModule, tokens: Tensor) -> Path:
        """A name that no other training has."""
        digest = hashlib.sha256(graph_text(graph).encode())
        digest.update(json.dumps([self.options(), torch.__version__], default=str, sort_keys=True).encode())
        for value in (tokens, *parameters(graph).values()):
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return Path(f"{self.name}-{digest.hexdigest()[:16]}.pt")


def _to_nearest(step: Pass) -> Pass:
    gptq = isinstance(step, QuantizeWeights) and step.method == "gptq"
    return dataclasses.replace(step, method="rtn") if gptq else step  # type: ignore[call-arg]


def _is_scale(key: str) -> bool:
    return key.endswith(".scale")


def _moved(graph: fx.GraphModule, trained: set[str]) -> set[str]:
    """Names of values that stand in a basis that was trained."""
    moved = {n.name for n in graph.graph.nodes if is_op(n, "rotate", "kronecker")}
    for cls in infer_bases(graph).classes:
        if any(n.target in trained for n in upstream(axis.node for axis in cls.parameters)):
            moved |= {node.name for node, _ in cls.values}
    return moved
