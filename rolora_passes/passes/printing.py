"""Graphs as text, before and after a pass: to standard error, or to a folder."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import fx

from rolora_passes.graphs.text import graph_text

Print = Literal["never", "failed", "changed", "all"]


@dataclass(frozen=True)
class Printing:
    """What is written, `print_graph` and `print_to` of `apply_passes`."""

    when: Print
    folder: str | Path | None

    def done(self, name: str, before: fx.GraphModule, after: fx.GraphModule, modified: bool) -> None:
        """Write what a pass made, or changed."""
        if self.when == "all":
            self._write(name, graph_text(after))
        elif self.when == "changed" and modified:
            self._write(name, graph_diff(before, after))

    def failed(self, name: str, graph: fx.GraphModule) -> None:
        """Write what a pass that failed leaves."""
        if self.folder is not None or self.when == "failed":
            self._write(f"{name}-failed", graph_text(graph))

    def _write(self, name: str, text: str) -> None:
        if self.folder is None:
            print(f"=== {name}\n{text}", file=sys.stderr)
            return
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        (Path(self.folder) / f"{name}.txt").write_text(text, "utf-8")


def graph_diff(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """A unified diff of two graphs' texts."""
    old, new = graph_text(before).splitlines(), graph_text(after).splitlines()
    return "\n".join(difflib.unified_diff(old, new, "before", "after", lineterm="", n=1)) + "\n"
