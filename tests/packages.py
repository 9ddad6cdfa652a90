"""Packages of others, found by their entry points as if pip had installed them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

THIRD_PARTY = Path(__file__).parent / "third_party"
"""A folder with the package `acme`, which adds a pass, a grid, an operator and a target."""
ACME = tomllib.loads((THIRD_PARTY / "pyproject.toml").read_text("utf-8"))["project"]
Groups = Mapping[str, Mapping[str, str]]


def write_metadata(folder: Path, name: str, version: str, groups: Groups) -> None:
    """Write to a folder what pip writes beside a package's modules; `groups` are its entry points."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for group, named in groups.items()
    ]
    (about / "entry_points.txt").write_text("\n".join(sections))
