"""lm-eval's YAML task files, read as data: whatever would run Python is refused or sandboxed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

from rolora_passes.errors import EvaluationError, one_line
from rolora_passes.extras import require

_DATA = "tag:yaml.org,2002:"


def require_data(path: Path) -> None:
    """Refuse a file that makes lm-eval run Python (`!function module.name`), itself or in files it includes.

    Raises:
        EvaluationError: the file does so, or is not YAML.
    """
    files, seen = [path], set[Path]()
    while files:
        file = files.pop()
        if file in seen:
            continue
        seen.add(file)
        try:
            nodes = list(_nodes(yaml.compose(file.read_text("utf-8"), yaml.SafeLoader)))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise EvaluationError(f"{file} is not a task in YAML: {one_line(error)}") from error
        for node in nodes:
            if not str(node.tag).startswith(_DATA):
                raise EvaluationError(
                    f"{file} has lm-eval run {node.tag} {node.value}; a task file may hold data alone: "
                    "write what the function does as a template, or name a task that lm-eval has"
                )
            files += [place for name in _included(node) if (place := file.parent / name).is_file()]


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    stack, seen = [root] if root else [], set[int]()
    while stack:
        node = stack.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            stack += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            stack += node.value


def _included(node: yaml.Node) -> list[str]:
    """The files that a mapping includes."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    included = [value for key, value in pairs if key.value == "include"]
    scalars = [
        one for value in included for one in (value.value if isinstance(value.value, list) else [value])
    ]
    return [str(one.value) for one in scalars]


def keep_templates_from_python() -> None:
    """Run lm-eval's templates in jinja's sandbox; outside it, a template can call any Python function."""
    utils: Any = require("lm_eval.utils", "eval")
    own = utils.env
    if not isinstance(own, SandboxedEnvironment):
        keep = own.keep_trailing_newline
        utils.env = SandboxedEnvironment(
            loader=own.loader, undefined=own.undefined, keep_trailing_newline=keep
        )
        utils.env.filters |= own.filters
