"""What other packages add, by entry points: one group for each kind of thing, one name for each thing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rolora_passes.errors import RoloraError, one_line


def plugin_names(group: str) -> list[str]:
    """The names in a group; nothing is imported."""
    return list(dict.fromkeys(entry.name for entry in entry_points(group=group)))


def load_plugin(group: str, name: str, own: Iterable[str], error: type[RoloraError]) -> Any | None:
    """What another package registers under a name; None if none does.

    Args:
        own: the names that this package has itself.

    Raises:
        RoloraError: of the class `error`; two packages have this name, or one that cannot be imported.
    """
    entries = [entry for entry in entry_points(group=group) if entry.name == name]
    owners = [*(["rolora-passes"] if name in own else []), *map(_owner, entries)]
    if len(owners) > 1:
        raise error(
            f"expected one package with {name!r} in {group}, found it in {' and '.join(owners)}: "
            "uninstall all but one"
        )
    if not entries:
        return None
    try:
        return entries[0].load()
    except Exception as problem:  # whatever another package raises
        raise error(
            f"{name!r} of {owners[0]} cannot be loaded: {one_line(problem)}; mend or uninstall that package"
        ) from problem


def _owner(entry: EntryPoint) -> str:
    """The distribution; of one that says nothing of itself, the module."""
    return entry.dist.name if entry.dist is not None else entry.module
