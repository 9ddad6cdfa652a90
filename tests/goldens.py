"""Texts that are compared with files under tests/golden, written anew where ROLORA_WRITE_GOLDEN is set."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"


def check_golden(name: str, text: str) -> None:
    """The text is what the file holds; a difference is to be read, then accepted or mended."""
    path = FOLDER / f"{name}.txt"
    if os.environ.get("ROLORA_WRITE_GOLDEN"):
        path.write_text(text, "utf-8")
    assert path.is_file(), f"no {path.name}: run this test with ROLORA_WRITE_GOLDEN=1, and read what it wrote"
    assert text == path.read_text("utf-8"), f"{path.name} differs; if that is meant: ROLORA_WRITE_GOLDEN=1"
