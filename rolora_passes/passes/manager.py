"""The pass manager: order checked, every exact pass verified, and an account of what was done."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from rolora_passes.errors import GraphFormatError, NoSiteWarning, PassError
from rolora_passes.graphs.capture import from_exported
from rolora_passes.graphs.devices import Device, computing_on
from rolora_passes.graphs.facts import ROUNDED, facts, refuted, require_legal
from rolora_passes.graphs.graph import copy_graph, parameters
from rolora_passes.graphs.identity import Untouched
from rolora_passes.graphs.info import Record as Record
from rolora_passes.graphs.info import history as history
from rolora_passes.graphs.info import info, set_info
from rolora_passes.graphs.text import graph_text
from rolora_passes.graphs.verify import Verified, in_a_row
from rolora_passes.memory import peak_mb
from rolora_passes.passes.base import Calibration, Pass, Report
from rolora_passes.passes.order import check_order as check_order
from rolora_passes.passes.order import require_calibration as require_calibration
from rolora_passes.passes.printing import Print, Printing
from rolora_passes.passes.registry import PASSES, PassLike, make_pass

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applied:
    """One pass of a list, applied.

    Attributes:
        step: the pass.
        graph: what it made.
        record: what it did.
        calibration: what it was given, with the graph to learn from where something was rounded.
    """

    step: Pass
    graph: fx.GraphModule
    record: Record
    calibration: Calibration | None


@dataclass(frozen=True)
class Failure:
    """A pass that failed, and all that it takes to have it fail again.

    Attributes:
        step: the pass.
        graph: what it was given.
        calibration, verify: as `steps` had them.
        error: what was raised.
    """

    step: Pass
    graph: fx.GraphModule
    calibration: Calibration | None
    verify: bool
    error: Exception


def apply_passes(
    graph: fx.GraphModule | torch.export.ExportedProgram,
    passes: Iterable[PassLike],
    *,
    verify: bool = True,
    calibration: Calibration | Tensor | None = None,
    device: Device | None = None,
    print_graph: Print = "never",
    print_to: str | Path | None = None,
    on_pass: Callable[[Record], None] | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> fx.GraphModule:
    """Apply passes in order to a copy of a graph; tensors are shared until a pass replaces them.

    Args:
        graph: a captured graph, or an ExportedProgram of `forward(tokens, positions) -> logits`.
        passes: pass objects, names ("fuse-norm"), or one-entry mappings ({"rotate": {"seed": 1}}).
        verify: run the graph before and after every exact pass on random tokens, and fail if it
            differs, naming the pass, the first value that differs, and by how much.
        calibration: tokens int64 [N, S] for the passes that look at data, or a `Calibration` that says
            more; see `rolora_passes.loading.data`.
        device: where to compute ("cuda", "auto", …): the graph's tensors, which stay where they are, travel
            there as they are read, and results come back; None: where the graph's tensors are.
        print_graph: write the graph as text after passes that changed it, or after all; "failed": only of a
            pass that fails, what it made if it does not verify, else what it was given.
        print_to: the folder for that; standard error if None. With a folder, a failure is always written.
        on_pass: called with each pass's record as it is done (for progress).
        on_failure: called when a pass fails, before its error is raised.

    Returns: the new graph; `history(graph)` has a Record for every pass.

    Raises:
        GraphFormatError: not a captured graph.
        PassOrderError: a pass's requirement does not hold where it stands: before anything is run, if no pass
            before it is to establish it; else when that has run and found no site.
        VerificationError: an exact pass changed the function.
        PassError: a pass cannot do what its options ask, or needs calibration and there is none.
        DeviceError: torch has no such device here.
    """
    current = given = _captured(graph)
    for applied in steps(
        given,
        passes,
        verify=verify,
        calibration=calibration,
        device=device,
        print_graph=print_graph,
        print_to=print_to,
        on_failure=on_failure,
    ):
        if on_pass:
            on_pass(applied.record)
        current = applied.graph
    return copy_graph(given) if current is given else current


def steps(
    graph: fx.GraphModule | torch.export.ExportedProgram,
    passes: Iterable[PassLike],
    *,
    verify: bool = True,
    calibration: Calibration | Tensor | None = None,
    device: Device | None = None,
    print_graph: Print = "never",
    print_to: str | Path | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> Iterator[Applied]:
    """`apply_passes` one pass at a time: what each made, as soon as it has.

    Args, and what it raises: those of `apply_passes`.
    """
    current, pipeline, printing = _captured(graph), _pipeline(passes), Printing(print_graph, print_to)
    require_legal(current, "from rolora_passes.graphs.capture")
    check_order(pipeline, facts(current, {f for step in pipeline for f in (*step.requires, *step.forbids)}))
    if isinstance(calibration, Tensor):
        calibration = Calibration(calibration)
    require_calibration(pipeline, calibration, info(current).vocabulary)
    verified = Verified()
    for number, step in enumerate(pipeline):
        calibration = _referring(calibration, current, step)
        try:
            with in_a_row(verified), computing_on(device):
                made, record = _apply(current, step, verify, calibration, number, printing)
        except Exception as error:
            if on_failure:
                on_failure(Failure(step, current, calibration, verify, error))
            raise
        _log.info("%s", record)
        yield Applied(step, made, record, calibration)
        current = made


def _captured(graph: fx.GraphModule | torch.export.ExportedProgram) -> fx.GraphModule:
    if isinstance(graph, torch.export.ExportedProgram):
        return from_exported(graph)
    if not isinstance(graph, fx.GraphModule):
        raise GraphFormatError(
            f"expected a captured graph, found {type(graph).__name__}: "
            "call rolora_passes.graphs.capture on it first"
        )
    return graph


def _pipeline(passes: Iterable[PassLike]) -> list[Pass]:
    if isinstance(passes, (Pass, str, Mapping)) or not isinstance(passes, Iterable):
        raise PassError(f"expected a list of passes, found {passes!r}: write [{passes!r}]")
    return [make_pass(p) for p in passes]


def _referring(calibration: Calibration | None, graph: fx.GraphModule, step: Pass) -> Calibration | None:
    """What a pass is given, with `graph` as the reference if the pass is the first to round anything."""
    if calibration is None or not ROUNDED & {*step.ensures} or facts(graph, ROUNDED):
        return calibration
    return dataclasses.replace(calibration, reference=graph)


def _apply(
    before: fx.GraphModule,
    step: Pass,
    verify: bool,
    calibration: Calibration | None,
    number: int,
    printing: Printing,
) -> tuple[fx.GraphModule, Record]:
    after, shown, error, tensors = copy_graph(before), before, None, Untouched(before)
    place = f"{number:02d}-{step.name}"
    try:
        if number:  # the first was checked with the order
            check_order([step], facts(before, {*step.requires, *step.forbids}))
        start = time.perf_counter()
        report = _ran(step, after, calibration)
        _require_untouched(tensors, step)
        seconds = time.perf_counter() - start
        shown = after  # whole from here on
        start = time.perf_counter()
        _check_claims(after, step, report)
        if verify and step.exact and not _identical(before, after):
            error = step.verify(before, after, report)
    except Exception:
        printing.failed(place, shown)
        raise
    counts = len(before.graph.nodes), len(after.graph.nodes)
    spent = time.perf_counter() - start
    record = Record(step.name, step.options(), step.kind, seconds, spent, peak_mb(), counts, report, error)
    set_info(after, history=(*info(before).history, record))
    printing.done(place, before, after, report.modified)
    return after, record


def _ran(step: Pass, graph: fx.GraphModule, calibration: Calibration | None) -> Report:
    """Run a pass.

    Raises:
        PluginError: a pass of another package raised something else than an error of ours.
        PassError: the pass does not return a Report.
    """
    with PASSES.telling(step.name):
        if calibration is not None and step.needs_calibration:
            report = step.calibrate(graph, calibration)
        else:
            report = step.run(graph)
        json.dumps(getattr(report, "notes", None))  # they are saved with the graph
    if not isinstance(report, Report):
        raise PassError(f"expected {step.name} to return a Report, found {report!r:.80}")
    return report


def _require_untouched(tensors: Untouched, step: Pass) -> None:
    """Refuse a pass that wrote into tensors, which it shares with the graph before and with the model."""
    if written := tensors.written():
        names = ", ".join(written[:3]) + (" and others" if written[3:] else "")
        raise PassError(
            f"{step.name} wrote into {names}, which the graph before and the model share: load the model "
            "again, and have the pass write an expression (rolora_passes.graphs.expressions), or a new tensor"
        )


def _check_claims(graph: fx.GraphModule, step: Pass, report: Report) -> None:
    """Check that what a pass leaves is legal, and that the facts hold that it says it establishes.

    Raises:
        GraphFormatError: the graph is not legal.
        PassError: a fact that it ensures does not hold, or one that it removes still does.
    """
    require_legal(graph, f"after {step.name}")
    broken = {fact: reason for fact in step.ensures if (reason := refuted(graph, fact))}
    if not report.changed:
        if broken or not step.ensures:
            why = "; ".join(f"{site}: {reason}" for site, reason in report.left[:2])
            warnings.warn(f"{step.name} found no site. {why}", NoSiteWarning, stacklevel=5)
        return
    for fact, reason in broken.items():
        raise PassError(f"{step.name} says that it leaves a graph with {fact!r}, but {reason}")
    for fact in step.removes:
        if refuted(graph, fact) is None:
            raise PassError(f"{step.name} says that it leaves a graph without {fact!r}, which still holds")


def _identical(before: fx.GraphModule, after: fx.GraphModule) -> bool:
    """Whether two graphs have the same nodes and the very same tensors, whatever a pass says it did."""
    old, new = parameters(before), parameters(after)
    same = old.keys() == new.keys() and all(old[name] is new[name] for name in old)
    return same and graph_text(before) == graph_text(after)
