"""A graph in words: a summary, and which of its axes can rotate together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import fx

from rolora_passes.graphs.accounting import weigh
from rolora_passes.graphs.bases.inference import BasisClass, Group, infer_bases
from rolora_passes.graphs.facts import facts
from rolora_passes.graphs.info import info
from rolora_passes.inspection.structure import numberless

GROUPS = {
    Group.NONE: "nothing",
    Group.PERMUTATION: "a permutation",
    Group.ORTHOGONAL: "any orthogonal matrix",
    Group.INVERTIBLE: "any invertible matrix (its inverse transpose on the reading side)",
}


def summary(graph: fx.GraphModule) -> str:
    """The model, the facts that hold, the size of the weights, and the rotations applied."""
    weights = weigh(graph)
    most = [(bits, n) for bits, n in weights.by_bits.items() if 1000 * n >= weights.elements]
    widths = ", ".join(f"{n / 1e6:.1f} M at {bits} bits" for bits, n in most)
    config = info(graph).config
    name, kind = Path(config.get("name", "unknown")).name, config.get("model_type", "of unknown type")
    lines = [
        f"model      {name} ({kind})",
        f"facts      {', '.join(facts(graph)) or 'none'}",
        f"weights    {weights.elements / 1e6:.1f} M ({widths}), {weights.bits_per_weight:.2f} bits each "
        f"with scales, {weights.megabytes:.1f} MB",
    ]
    rotations = Counter(
        numberless(f"{key} ({r.size}, {r.method})") for key, r in info(graph).rotations.items()
    )
    if rotations:
        shown = [key + (f" x{n}" if n > 1 else "") for key, n in rotations.items()]
        lines.append(f"rotations  {_folded(shown)}")
    return "\n".join(lines) + "\n"


def bases_text(graph: fx.GraphModule) -> str:
    """Which axes can rotate together, by which matrices, and what blocks the others."""
    classes = infer_bases(graph).classes
    free = [c for c in classes if c.free]
    shown = [c for c in classes if not c.free and (c.kind != "inner" or c.group is Group.PERMUTATION)]
    lines = ["Axes that can change basis together:", ""]
    for group in alike(free):
        lines += _describe(group)
    if not free:
        lines += ["  none", ""]
    lines += ["Axes that cannot rotate, and what blocks them:", ""]
    for group in alike(shown):
        lines += _describe(group)
    pinned = sum(not c.free for c in classes) - len(shown)
    lines.append(f"{pinned} more axes are fixed by their meaning: vocabulary rows, heads, positions, tables.")
    return "\n".join(lines) + "\n"


def alike(classes: Iterable[BasisClass]) -> list[list[BasisClass]]:
    """Classes grouped so that those of a group differ only in their layer."""
    groups: dict[object, list[BasisClass]] = {}
    for cls in classes:
        key = (cls.kind, cls.size, cls.group, tuple(_numberless(str(p)) for p in cls.parameters))
        groups.setdefault(key, []).append(cls)
    return list(groups.values())


def _numberless(text: str) -> str:
    return re.sub(r"\d+", "*", text)


def _describe(group: list[BasisClass]) -> list[str]:
    first = group[0]
    name = first.name if len(group) == 1 else f"{first.name} … {group[-1].name} ({len(group)} alike)"
    lines = [f"  {name}: {first.size} channels, admits {GROUPS[first.group]}"]
    written = [str(p) for p in first.parameters if not p.flipped]
    read = [str(p) for p in first.parameters if p.flipped]
    if len(group) == 1 and len(first.parameters) > 6:
        written, read = (list(dict.fromkeys(map(layerless, side))) for side in (written, read))
    for verb, side in (("on one side", written), ("on the other", read)):
        if side:
            lines.append(f"    {verb}: {_folded(side)}")
    if not first.free:
        lines.append(f"    blocked: {first.why_rigid()}")
    return [*lines, ""]


def layerless(text: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", text)


def _folded(items: list[str]) -> str:
    return ", ".join(items[:8]) + (f", and {len(items) - 8} more" if len(items) > 8 else "")
