"""A self-contained HTML file: page, style, scripts, plotting library and data."""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from rolora_passes.extras import require
from rolora_passes.files import writing
from rolora_passes.reporting.arrays import Arrays

SCRIPTS = ("core", "outliers", "errors", "grids", "structure", "main")


def plotting_library() -> str:
    """The source of plotly.js.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    return str(require("plotly.offline", "report").get_plotlyjs())


def write_page(data: dict[str, Any], arrays: Arrays, path: str | Path) -> None:
    """Write the page that shows what `gather` found; the file is complete or not there."""
    about = data["about"]
    text = Template(_file("page.html")).substitute(
        title=html.escape(f"{about['model']}, {about['recipe']}"),
        style=_file("page.css"),
        script="\n".join(_file(f"{name}.js") for name in SCRIPTS),
        library=packed(plotting_library().encode()),
        data=packed(json.dumps(_plain(data), allow_nan=False).encode()),
        arrays=packed(bytes(arrays)),
    )
    with writing(path) as temporary:
        temporary.write_text(text, "utf-8")


def packed(content: bytes) -> str:
    """Bytes in the form that the page's script unpacks: gzip in base64."""
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")


def _file(name: str) -> str:
    return (resources.files("rolora_passes.reporting") / "page" / name).read_text("utf-8")


def _plain(value: Any) -> Any:
    """A value for JSON, which has no infinity and no NaN: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
