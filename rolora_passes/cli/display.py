"""What the command line prints: progress, and a summary of what was compiled."""

from __future__ import annotations

import logging
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rolora_passes.export.compile import Compiled
    from rolora_passes.passes.manager import Record

console = Console(stderr=True, highlight=False)
_log = logging.getLogger(__name__)


class Display:
    """The current stage and progress bars, on standard error."""

    def __init__(self) -> None:
        from rich import progress  # help does without

        self._progress = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[count]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._stage = self._progress.add_task("starting …", total=None, count="")
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str) -> None:
        """Begin a stage; the bars of the last one disappear."""
        _log.info("%s", name)
        for bar in self._bars.values():
            self._progress.remove_task(bar)
        self._bars = {}
        self._progress.reset(self._stage, description=f"{name} …")

    def count(self, name: str, done: int, total: int) -> None:
        """Update a bar. Bars are told apart by their name up to a comma; the rest may change."""
        what = name.partition(",")[0]
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(name, count="")
        bar, count = self._bars[what], f"{done}/{total}"
        self._progress.update(bar, description=name, completed=done, total=total, count=count)


def pass_line(record: Record) -> None:
    checked = "" if record.error is None else f", same function to {record.error:.0e}"
    left = f", {len(record.report.left)} left" if record.report.left else ""
    console.print(f"  {record.name:22} {_sites(record):>10}{left}, {record.seconds:.1f} s{checked}")
    stages = record.report.notes.get("stages", [])
    if stages:
        _gptq_line(stages, record.peak_mb)


def _gptq_line(stages: list[dict[str, Any]], peak_mb: float) -> None:
    """Where GPTQ spent its time, and which outputs it changed the most."""
    resumed = [stage for stage in stages if stage["resumed"]]
    forward = sum(stage["forward"] for stage in stages)
    solve = sum(stage["solve"] for stage in stages if not stage["resumed"])
    lost = {name: error for stage in stages for name, error in stage["sites"].items()}
    worst = max(lost, key=lambda name: lost[name])
    earlier = f"{len(resumed)} of {len(stages)} stages from an earlier run, " if resumed else ""
    console.print(
        f"  {'':22} {earlier}{forward:.0f} s of forward passes and Hessians, {solve:.0f} s of rounding, "
        f"peak {peak_mb:.0f} MB; outputs change the most at {worst}, by {lost[worst] ** 0.5:.1%}"
    )


def print_summary(compiled: Compiled) -> None:
    """Sizes, what every pass did, and how close the programs are to the model."""
    table = Table(title=escape(str(compiled.folder)), show_header=False, title_justify="left")
    weights = compiled.weights
    bits_each = f"{weights.bits_per_weight:.2f} bits each with scales"
    table.add_row("weights", f"{weights.elements / 1e6:.1f} M, {bits_each}")
    for bits, count in weights.by_bits.items():
        table.add_row("", f"{count / 1e6:.1f} M at {bits} bits")
    for record in compiled.history:
        table.add_row(record.name, _outcome(record))
    for target, lowering in compiled.lowerings.items():
        for row in lowering.rows():
            table.add_row(target, row)
            target = ""
    if compiled.loss:
        table.add_row("loss", compiled.loss["summary"])
    table.add_row("seconds", ", ".join(f"{name} {value:.0f}" for name, value in compiled.seconds.items()))
    Console().print(table)
    if compiled.parity:
        Console().print(parity_table(compiled.parity))


def parity_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `evaluation.parity.compare_programs`."""
    title = f"On {rows[0]['tokens']} tokens of text: KL in nats per token, top-1 agreement"
    table = Table(title=title, title_justify="left")
    names = ("", "KL to model", "top-1", "KL to graph", "top-1", "greedy tokens equal to the graph's")
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        model = (f"{row['kl']:.2e}", f"{row['top1']:.0%}")
        graph = (f"{row['kl_graph']:.2e}", f"{row['top1_graph']:.0%}", f"{row['greedy']} of {row['of']}")
        table.add_row(row["name"], *model, *(graph if row["name"] != "quantized graph" else ("", "", "")))
    return table


def _sites(record: Record) -> str:
    return f"{len(record.report.changed)} sites" if record.report.changed else "no site"


def _outcome(record: Record) -> str:
    text = _sites(record)
    if record.report.left:
        reasons = Counter(reason for _, reason in record.report.left)
        text += "".join(f"; {count} left: {reason}" for reason, count in reasons.most_common(2))
    return text
