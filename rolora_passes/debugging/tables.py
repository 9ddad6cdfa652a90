"""Diagnoses as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.markup import escape
from rich.table import Table

from rolora_passes.debugging.bisect import PassLoss, SiteBisection, costliest
from rolora_passes.debugging.counterfactuals import Counterfactuals
from rolora_passes.debugging.tracking import ErrorTrace, NodeError
from rolora_passes.evaluation.sensitivity import SiteLoss


def trace_table(trace: ErrorTrace, top: int, below: float, word: Callable[[int], str]) -> Table:
    """The values with the lowest SQNR, in graph order, and the first below a threshold.

    Args:
        top: how many values to show.
        below: the threshold, dB.
        word: decodes a token id.
    """
    first = trace.first_below(below)
    where = "no value is" if first is None else f"{escape(first.label)} ({_db(first)}) is the first value"
    table = Table(
        title=f"The {min(top, len(trace.nodes))} lowest SQNRs of {len(trace.nodes)} values, in graph order",
        caption=f"{where} below {below:g} dB\npredictions: KL {trace.kl:.4f} nats per token, "
        f"loss {trace.nll:+.4f}, top-1 agreement {trace.top1:.1%}",
        title_justify="left",
    )
    _columns(table, "value", "SQNR", "error", "largest, of", "worst token (its error)")
    worst = sorted(trace.nodes, key=lambda node: -math.inf if math.isnan(node.sqnr) else node.sqnr)[:top]
    for node in trace.nodes:
        if any(node is one for one in worst):
            token = ", ".join(f"{word(t.token)!r} at {t.position} ({t.error:.2g})" for t in node.worst[:1])
            largest = f"{node.max_error:.3g}, {node.max_abs:.3g}"
            table.add_row(escape(node.label), _db(node), f"{node.relative:.1%}", largest, escape(token))
    return table


def passes_table(losses: Sequence[PassLoss]) -> Table:
    """A recipe pass by pass; the pass that loses the most is in bold."""
    worst = costliest(losses)
    table = Table(title="The recipe pass by pass, KL in nats per token", title_justify="left")
    _columns(table, "pass", "kind", "of this pass", "since the start", "loss grows by")
    for loss in losses:
        kind = "WRONG" if loss.fault else loss.kind
        style = "bold" if loss is worst else ""
        figures = f"{loss.step:.2e}", f"{loss.kl:.2e}", f"{loss.nll:+.2e}"
        table.add_row(loss.name, kind, *figures, style=style)
    if worst is not None:
        table.caption = escape(worst.fault or f"the divergence grows most by {worst.name}")
    return table


def sites_table(found: SiteBisection) -> Table:
    """The sites that a divergence comes from, and what differs there."""
    advice = "\nno small set of sites explains it: see `rolora diagnose sensitivity`" if found.diffuse else ""
    table = Table(
        title="Where bisection leads" if found.diffuse else "The sites that lose the most",
        caption=f"KL with all {found.sites} differing sites {found.kl:.4f} nats per token\n"
        f"without these {found.left:.4f} ({found.evaluations} evaluations){advice}",
        title_justify="left",
    )
    _columns(table, "site", "KL alone", "part", "what differs")
    for fault in found.faults:
        part = f"{fault.kl / found.kl:.1%}" if math.isfinite(found.kl) else ""
        table.add_row(escape(fault.site), f"{fault.kl:.2e}", part, escape("\n".join(fault.differs)))
    return table


def changes_table(found: Counterfactuals, title: str, top: int) -> Table:
    """The effect of one change at a time, the largest first."""
    table = Table(
        title=title,
        caption=f"{len(found.changes)} changes, one at a time; with none: KL {found.kl:.4f} nats per token, "
        f"loss {found.nll:+.4f}",
        title_justify="left",
    )
    _columns(table, "site", "KL changes by", "part", "loss changes by")
    for change in found.changes[:top]:
        part = f"{change.kl / found.kl:+.1%}" if found.kl else ""
        table.add_row(escape(change.site), f"{change.kl:+.2e}", part, f"{change.nll:+.2e}")
    return table


def sensitivity_table(found: Sequence[SiteLoss], top: int) -> Table:
    """The costliest sites, and the sum over all sites, which is the total if losses add up."""
    total = sum(site.kl for site in found)
    table = Table(
        title="Each site quantized alone",
        caption=f"{len(found)} sites, one at a time; their KL adds up to {total:.4f} nats per token",
        title_justify="left",
    )
    _columns(table, "site", "KL", "part", "loss grows by")
    for site in found[:top]:
        part = f"{site.kl / total:.1%}" if total else ""
        table.add_row(escape(site.name), f"{site.kl:.2e}", part, f"{site.nll:+.2e}")
    return table


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first, overflow="fold")
    for name in others:
        words = name.startswith(("kind", "what", "worst"))
        table.add_column(name, justify="left" if words else "right", overflow="fold")


def _db(node: NodeError) -> str:
    return "equal" if node.relative == 0 else "NaN" if math.isnan(node.sqnr) else f"{node.sqnr:.1f} dB"
