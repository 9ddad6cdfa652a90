"""The pass manager: order checked, every exact pass verified, and an account of what was done."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx

from rolora_passes.errors import GraphFormatError, NoSiteWarning, PassError, PassOrderError
from rolora_passes.graphs.capture import from_exported
from rolora_passes.graphs.facts import FACTS, ROUNDED, facts, refuted, require_legal
from rolora_passes.graphs.graph import copy_graph, parameters
from rolora_passes.graphs.info import Record as Record
from rolora_passes.graphs.info import history as history
from rolora_passes.graphs.info import info, set_info
from rolora_passes.graphs.text import graph_text
from rolora_passes.graphs.verify import in_a_row
from rolora_passes.memory import peak_mb
from rolora_passes.passes.base import Calibration, Pass, Report
from rolora_passes.passes.registry import PassLike, make_pass

Print = Literal["never", "failed", "changed", "all"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """A pass that failed, and all that it takes to have it fail again.

    Attributes:
        step: the pass.
        graph: what it was given.
        calibration, verify: as `apply_passes` had them.
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
    print_graph: Print = "never",
    print_to: str | Path | None = None,
    on_pass: Callable[[Record], None] | None = None,
    on_graph: Callable[[Pass, fx.GraphModule], None] | None = None,
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
        print_graph: write the graph as text after passes that changed it, or after all; "failed": only of a
            pass that fails, what it made if it does not verify, else what it was given.
        print_to: the folder for that; standard error if None. With a folder, a failure is always written.
        on_pass: called with each pass's record as it is done (for progress).
        on_graph: called with each pass and the graph that it made.
        on_failure: called when a pass fails, before its error is raised.

    Returns: the new graph; `history(graph)` has a Record for every pass.

    Raises:
        GraphFormatError: not a captured graph.
        PassOrderError: a pass's requirement does not hold where it stands: before anything is run, if no pass
            before it is to establish it; else when that has run and found no site.
        VerificationError: an exact pass changed the function.
        PassError: a pass cannot do what its options ask, or needs calibration and there is none.
    """
    graph, pipeline = _captured(graph), _pipeline(passes)
    require_legal(graph, "from rolora_passes.graphs.capture")
    check_order(pipeline, facts(graph, {f for step in pipeline for f in (*step.requires, *step.forbids)}))
    if isinstance(calibration, Tensor):
        calibration = Calibration(calibration)
    require_calibration(pipeline, calibration, info(graph).vocabulary)
    current = graph
    with in_a_row():
        for number, step in enumerate(pipeline):
            calibration = referring(calibration, current, step)
            try:
                current, record = _apply(current, step, verify, calibration, number, print_graph, print_to)
            except Exception as error:
                if on_failure:
                    on_failure(Failure(step, current, calibration, verify, error))
                raise
            _log.info("%s", record)
            if on_pass:
                on_pass(record)
            if on_graph:
                on_graph(step, current)
    return current if pipeline else copy_graph(graph)


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


def referring(calibration: Calibration | None, graph: fx.GraphModule, step: Pass) -> Calibration | None:
    """What a pass is given, with `graph` as the reference if the pass is the first to round anything.

    `apply_passes` does this along its list; who applies passes one by one hands on what this returns.
    """
    if calibration is None or not ROUNDED & {*step.ensures} or facts(graph, ROUNDED):
        return calibration
    return dataclasses.replace(calibration, reference=graph)


def check_order(pipeline: Iterable[Pass], holding: Iterable[str]) -> None:
    """Check requirements and prohibitions along a pipeline, before anything runs.

    Args:
        holding: facts that hold of the graph that the pipeline is for.

    Raises:
        PassOrderError: names the pass, the fact, and the pass to run first or to leave out.
    """
    known = dict.fromkeys(holding, "before these passes")
    for step in pipeline:
        for fact in step.requires:
            if fact not in known:
                remedy = FACTS[fact].remedy if fact in FACTS else "see `rolora passes`"
                raise PassOrderError(
                    f"{step.name} requires a graph with {fact!r}, found {sorted(known) or 'none'}: {remedy}"
                )
        for fact in step.forbids:
            if fact in known:
                raise PassOrderError(
                    f"{step.name} cannot run on a graph that is already {fact!r} ({known[fact]}): "
                    "move it before what did that, or leave it out"
                )
        known = {fact: how for fact, how in known.items() if fact not in step.removes}
        known |= dict.fromkeys(step.ensures, f"by {step.name}")


def require_calibration(
    pipeline: Iterable[Pass], calibration: Calibration | None, vocabulary: int | None = None
) -> None:
    """Check, before anything runs, that passes that look at data have some.

    Raises:
        PassError: there is none, or it is not tokens int64 [N, S] with N and S at least 1, all of them in
            the vocabulary, if its size is known.
    """
    needy = [step.name for step in pipeline if step.needs_calibration]
    if needy and calibration is None:
        raise PassError(
            f"{needy[0]} looks at data and was given none: pass calibration=tokens, int64 [N, S] "
            "(rolora_passes.loading.data.calibration_tokens makes them from text), or --calibration FILE"
        )
    if needy and calibration is not None:
        tokens = calibration.tokens
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens.numel():
            raise PassError(
                f"expected calibration tokens int64 [N, S], found {tokens.dtype} {list(tokens.shape)}"
            )
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise PassError(
                f"expected calibration tokens of a vocabulary of {vocabulary}, found {low} to {high}: "
                "they are another tokenizer's"
            )


def _apply(
    before: fx.GraphModule,
    step: Pass,
    verify: bool,
    calibration: Calibration | None,
    number: int,
    print_graph: Print,
    print_to: str | Path | None,
) -> tuple[fx.GraphModule, Record]:
    after, shown = copy_graph(before), before
    error = None
    place = f"{number:02d}-{step.name}"
    try:
        if number:  # the first was checked with the order
            check_order([step], facts(before, {*step.requires, *step.forbids}))
        start = time.perf_counter()
        if calibration is not None and step.needs_calibration:
            report = step.calibrate(after, calibration)
        else:
            report = step.run(after)
        seconds = time.perf_counter() - start
        shown = after  # whole from here on
        start = time.perf_counter()
        _check_claims(after, step, report)
        if verify and step.exact and not _identical(before, after):
            error = step.verify(before, after, report)
    except Exception:
        if print_to is not None or print_graph == "failed":
            _write(place + "-failed", graph_text(shown), print_to)
        raise
    counts = len(before.graph.nodes), len(after.graph.nodes)
    spent = time.perf_counter() - start
    kind = "exact" if step.exact else "trained" if step.kind == "trained" else "lossy"
    record = Record(step.name, step.options(), kind, seconds, spent, peak_mb(), counts, report, error)
    set_info(after, history=(*info(before).history, record))
    if print_graph == "all" or (print_graph == "changed" and report.modified):
        _write(place, graph_diff(before, after) if print_graph == "changed" else graph_text(after), print_to)
    return after, record


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
            warnings.warn(f"{step.name} found no site. {why}", NoSiteWarning, stacklevel=4)
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


def graph_diff(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """A unified diff of two graphs' texts."""
    old, new = graph_text(before).splitlines(), graph_text(after).splitlines()
    return "\n".join(difflib.unified_diff(old, new, "before", "after", lineterm="", n=1)) + "\n"


def _write(name: str, text: str, folder: str | Path | None) -> None:
    if folder is None:
        print(f"=== {name}\n{text}", file=sys.stderr)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{name}.txt").write_text(text, "utf-8")
