"""Draw the package: its rooms, and which imports which.

python scripts/house.py [PACKAGE]     the drawing as SVG; of a folder, if one is given
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "rolora_passes"
WIDTH, HEIGHT, GAP, ROW = 120, 34, 18, 74
LOOSE = "(loose)"
Edges = dict[str, set[str]]


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports, those for type checkers alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node)


def rooms(package: Path) -> tuple[dict[str, int], Edges]:
    """The files in every room, and the rooms that each imports; `LOOSE` is what lies in none."""
    sizes: dict[str, int] = defaultdict(int)
    edges: Edges = defaultdict(set)
    folders = {path.parent.name for path in package.glob("*/*.py")}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if len(parts) == 1 and parts[0] in ("__init__.py", "__main__.py", "moved.py"):
            continue  # they name what is in the rooms
        room = parts[0] if len(parts) > 1 else LOOSE
        sizes[room] += 1
        for name in imported(ast.parse(path.read_text("utf-8"))):
            root, _, rest = name.partition(".")
            if root == package.name and rest:
                edges[room].add(first if (first := rest.partition(".")[0]) in folders else LOOSE)
    return sizes, {room: edges[room] - {room} for room in sizes}


def circles(edges: Edges) -> set[str]:
    """Rooms that import each other, directly or through others."""
    return {room for room in edges if room in _reached(edges, room)}


def cut(edges: Edges) -> tuple[Edges, list[tuple[str, str]]]:
    """The imports that point down, and those of loose files that close a circle."""
    up = sorted(edges[LOOSE]) if LOOSE in circles(edges) else []
    down = {room: others - set(up) if room == LOOSE else others for room, others in edges.items()}
    return down, [(LOOSE, room) for room in up]


def floors(down: Edges) -> list[list[str]]:
    """The rooms from the top floor down; a room stands above all that it imports."""

    def floor(room: str) -> int:
        return 1 + max(map(floor, down[room]), default=-1)

    levels: dict[int, list[str]] = defaultdict(list)
    for room in sorted(down):
        levels[floor(room)].append(room)
    return [levels[level] for level in sorted(levels, reverse=True)]


def arrows(down: Edges) -> list[tuple[str, str]]:
    """Imports that do not follow from others."""
    return [
        (room, other)
        for room, others in down.items()
        for other in sorted(others)
        if not any(other in _reached(down, o) for o in others - {other})
    ]


def draw(package: Path = PACKAGE) -> str:
    """The drawing as SVG: an arrow goes from a room to one that it imports; red ones close a circle."""
    sizes, edges = rooms(package)
    down, up = cut(edges)
    levels = floors(down)
    width = max(map(len, levels)) * (WIDTH + GAP) + GAP
    place = {}
    for row, level in enumerate(levels):
        left = (width - len(level) * (WIDTH + GAP) + GAP) / 2
        for column, room in enumerate(level):
            place[room] = (left + column * (WIDTH + GAP), GAP + row * ROW)
    height = len(levels) * ROW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 8 4 0 8z" fill="#666"/></marker></defs>',
    ]
    for room, other in [*arrows(down), *up]:
        (x, y), (u, v) = place[room], place[other]
        if v > y:
            path, color = f"M{x + WIDTH / 2} {y + HEIGHT}L{u + WIDTH / 2} {v}", "#888"
        else:  # beside the arrow down
            path, color = f"M{x + WIDTH - 9} {y}L{u + WIDTH - 9} {v + HEIGHT}", "#c0504d"
        lines.append(f'<path d="{path}" fill="none" stroke="{color}" marker-end="url(#tip)"/>')
    for room, (x, y) in place.items():
        files = f"{sizes[room]} file{'s' if sizes[room] > 1 else ''}"
        lines.append(
            f'<g><rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="#eef3f8" '
            'stroke="#1f4e79"/>'
            f'<text x="{x + WIDTH / 2}" y="{y + 15}" text-anchor="middle" font-weight="bold">{room}</text>'
            f'<text x="{x + WIDTH / 2}" y="{y + 28}" text-anchor="middle" font-size="10">{files}</text></g>'
        )
    return "\n".join([*lines, "</svg>"])


def _reached(edges: Edges, room: str) -> set[str]:
    found: set[str] = set()
    ahead = set(edges[room])
    while ahead:
        found |= ahead
        ahead = {other for one in ahead for other in edges[one]} - found
    return found


if __name__ == "__main__":
    print(draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE))
