"""Where in the model's code a node comes from: `node.meta["source"]`, like "modeling_llama.py:65: x * y".

It is what a report or an error says of a node; nothing is decided by it, and a node may have none.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n?([^\n]*)')
# torch's own files (what it adds itself says "torch/…"), and this package's.
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), "torch/", str(Path(__file__).parent.parent))


def note_source(node: fx.Node) -> None:
    """Read the innermost line of the model off the stack trace that export left, if there is one."""
    frames: list[tuple[str, str, str]] = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not frame[0].startswith(_NOT_THE_MODEL)]
    if own:
        file, line, code = own[-1]
        node.meta["source"] = f"{Path(file).name}:{line}: {code.strip()}"


def raised_at(error: BaseException) -> str:
    """The innermost line of the model that an error passed through, or ""."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.line and not f.filename.startswith(_NOT_THE_MODEL)]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line}" if own else ""


def take_source(node: fx.Node, other: fx.Node) -> None:
    """A node made for another comes from the same line."""
    if "source" in other.meta:
        node.meta["source"] = other.meta["source"]


def source_of(node: fx.Node) -> str:
    """What follows a node's name in an error: ", " and its line of the model, or ""."""
    return f", {node.meta['source']}" if "source" in node.meta else ""


def keep_only_source(node: fx.Node) -> None:
    """Let go of everything else that export noted: values, and whole stack traces."""
    node.meta = {key: value for key, value in node.meta.items() if key == "source"}
