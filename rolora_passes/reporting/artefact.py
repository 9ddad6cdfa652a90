"""A compiled folder in words, and the differences between two of them."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rolora_passes.export.folder import read_manifest

# These differ between any two runs and say nothing about the result.
_COSTS = {"seconds", "verify_seconds", "cpu_seconds", "peak_mb", "error"}


def artefact_text(folder: str | Path) -> str:
    """What a compiled folder holds, what was done to the model, and what runs outside of delegates.

    Raises:
        RunError: there is no manifest, or it is not one of ours.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    model = manifest.get("config", {}).get("model_type", "unknown")
    head = [
        ("source", f"{manifest.get('source')} ({model}), {manifest['max_length']} tokens of context"),
        ("weights", _weights(manifest.get("weights", {}))),
    ]
    for name, figures in manifest.get("targets", {}).items():
        head += _target_rows(name, figures)
    head += [(name, _figures(manifest.get(name, {}))) for name in ("seconds", "versions")]
    lines = [
        *(line for name, what in head for line in _wrapped(f"{name:16} {what}")),
        "",
        f"{'pass':22} {'sites':>5} {'left':>5} {'seconds':>8} {'verify':>8} {'peak MB':>8} {'error':>8}",
        *(line for row in manifest.get("passes", ()) for line in _pass_lines(row)),
        "",
        *_parity(manifest.get("parity", ())),
        *(f"{size / 1e3:12,.1f} kB  {name}" for size, name in _files(folder)),
    ]
    return "\n".join(lines) + "\n"


def _parity(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How close the programs are to the model, as `rolora compile` measured it."""
    if not rows:
        return
    tokens = f"on {rows[0]['tokens']} tokens"
    heads = f"{'KL to model':>12} {'top-1':>6} {'to graph':>9} {'top-1':>6}"
    yield f"{tokens:22} {heads}  greedy tokens equal to the graph's"
    for row in rows:
        yield (
            f"{row['name']:22} {row['kl']:12.2e} {row['top1']:6.0%} {row['kl_graph']:9.2e} "
            f"{row['top1_graph']:6.0%}  {row['greedy']} of {row['of']}"
        )
    yield ""


def _weights(found: dict[str, Any]) -> str:
    elements = found.get("elements", 0)
    most = [(bits, n) for bits, n in found.get("by_bits", {}).items() if 1000 * n >= elements]
    widths = ", ".join(f"{n / 1e6:.1f} M at {bits} bits" for bits, n in most)
    return f"{elements / 1e6:.1f} M ({widths}), {found.get('bits_per_weight')} bits each with scales"


def _target_rows(name: str, figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a lowering wrote, by operator; with delegates, the instructions outside of them."""
    rest = {key: value for key, value in figures.items() if key not in ("operators", "delegates", "notes")}
    yield name, _figures(rest)
    operators, delegates = figures.get("operators", {}), figures.get("delegates")
    census = f"{sum(operators.values())} " + ("nodes" if delegates is None else "instructions")
    listed = ", ".join(f"{count} {operator}" for operator, count in operators.items())
    if delegates is not None:
        yield "  delegated", f"{delegates} delegates"
    yield (
        "  operators" if delegates is None else "  not delegated",
        census + (f": {listed}" if listed else ""),
    )
    for note, count in figures.get("notes", {}).items():
        yield "", f"{count} times: {note}"


def artefact_diff(first: str | Path, second: str | Path) -> str:
    """The differences between two compiled folders, apart from what compiling them cost."""
    old, new = (dict(_described(Path(folder))) for folder in (first, second))
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if key not in new:
            lines.append(f"- {key}: {old[key]}")
        elif key not in old:
            lines.append(f"+ {key}: {new[key]}")
        elif old[key] != new[key]:
            lines.append(f"~ {key}: {old[key]} -> {new[key]}")
    return "\n".join(lines or ["no difference"]) + "\n"


def _described(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from _flat("", read_manifest(folder))
    yield from ((f"size of {name}", size) for size, name in _files(folder) if name != "manifest.json")


def _pass_lines(row: dict[str, Any]) -> Iterator[str]:
    report, error = row["report"], row["error"]
    yield (
        f"{row['name']:22} {len(report['changed']):5} {len(report['left']):5} {row['seconds']:8.1f} "
        f"{row['verify_seconds']:8.1f} {row['peak_mb']:8.0f} "
        + (f"{error:8.0e}" if error is not None else " " * 8)
    ).rstrip()
    if row["options"]:
        yield "  " + ", ".join(f"{key} {value}" for key, value in row["options"].items())
    for reason, count in Counter(reason for _, reason in report["left"]).most_common():
        yield f"  {count} left: {reason}"


def _figures(values: dict[str, Any]) -> str:
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            words.append(f"{name.replace('_', ' ')}: {_figures(value)}")
        elif name.endswith("bytes"):
            words.append(f"{name.removesuffix('bytes').replace('_', ' ')}{value / 1e6:.1f} MB")
        else:
            words.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(words)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 110, subsequent_indent=" " * 17, break_on_hyphens=False, break_long_words=False
    )


def _files(folder: Path) -> list[tuple[int, str]]:
    """(bytes, name) of every file, the largest first."""
    found = [(p.stat().st_size, str(p.relative_to(folder))) for p in folder.rglob("*") if p.is_file()]
    return sorted(found, key=lambda item: (-item[0], item[1]))


def _flat(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of nested JSON; passes are keyed by name, and long lists reduced to a length."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in _COSTS:
                yield from _flat(f"{place}.{key}" if place else key, inner)
    elif isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
        seen: Counter[str] = Counter()
        for inner in value:
            seen[inner["name"]] += 1
            number = f" {seen[inner['name']]}" if seen[inner["name"]] > 1 else ""
            yield from _flat(f"{place}.{inner['name']}{number}", inner)
    elif isinstance(value, list):
        yield place, value if len(value) < 5 else f"{len(value)} entries"
    else:
        yield place, value
