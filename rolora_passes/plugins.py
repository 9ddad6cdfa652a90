"""What other packages add by entry points: passes, grids of quantizers, and what else has a `Registry`.

A package names an object in its `pyproject.toml`, and from when it is installed the name works everywhere:

    [project.entry-points."rolora_passes.passes"]
    acme-sort = "acme.sorting:AcmeSort"
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from rolora_passes.errors import PassError, PluginError, RoloraError, is_out_of_memory, nearest, one_line

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name: ours, and those that other packages register.

    Args:
        kind: what they are, for messages: "pass".
        group: of entry points.
        ours: our own by name; called when one is asked for, so that a registry imports none of them.
        wrong: what is wrong with an object that another package registers, by its name; None if nothing is.
        unknown: the error for a name that nothing has.
        old: a group that goes on working for one release, with a warning.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        ours: Callable[[], Mapping[str, T]],
        wrong: Callable[[str, object], str | None],
        unknown: type[RoloraError] = PassError,
        old: str | None = None,
    ) -> None:
        self.kind, self.group = kind, group
        self._ours, self._wrong, self._unknown, self._old = ours, wrong, unknown, old

    def __iter__(self) -> Iterator[str]:
        """Every name: ours first, in their order, then those of other packages."""
        yield from self._ours()
        yield from sorted(self._others().keys() - self._ours().keys())

    def __contains__(self, name: object) -> bool:
        return name in self._ours() or name in self._others()

    def __getitem__(self, name: str) -> T:
        """The object of a name. A name of ours stays ours: another package's is refused, with a warning.

        Raises:
            PluginError: two packages give the name to theirs, or what one registers cannot be loaded or is
                not of this kind; names the package. Of an unknown name, the error `unknown`.
        """
        ours, others = self._ours(), self._others().get(name, ())
        if name in ours:
            for clash in self.clashes(name):
                warnings.warn(clash, UserWarning, stacklevel=3)
            return ours[name]
        if not others:
            raise self._unknown(
                f"expected the name of a {self.kind}, found {name!r}; there are {', '.join(sorted(self))}; "
                "one of another package is there when that is installed" + nearest(name, self)
            )
        if len(others) > 1:
            both = " and ".join(map(_distribution, others))
            raise PluginError(f"{both} both register a {self.kind} {name!r}: uninstall one of them")
        return self._load(others[0])

    def origin(self, name: str) -> str | None:
        """The package, with its version, that a name comes from; None for ours."""
        return None if name in self._ours() else _distribution(self._others()[name][0])

    @contextmanager
    def telling(self, name: str) -> Iterator[None]:
        """Run what an object does: an error of another package's code is told with the package.

        Raises:
            PluginError: so it is. Errors of ours, of files and of memory are raised as they are.
        """
        try:
            yield
        except (RoloraError, MemoryError, OSError):
            raise
        except Exception as error:
            owner = self.origin(name) if name in self else None
            if owner is None or is_out_of_memory(error):
                raise
            raise PluginError(f"the {self.kind} {name} of {owner} failed: {one_line(error)}") from error

    def clashes(self, name: str) -> list[str]:
        """What is refused because the name is ours."""
        others = self._others().get(name, ()) if name in self._ours() else ()
        return [
            f"{_distribution(entry)} registers a {self.kind} {name!r}, which is a name of rolora-passes: "
            "it is refused, and has to be called otherwise"
            for entry in others
        ]

    def _load(self, entry: EntryPoint) -> T:
        where = f"{_distribution(entry)} registers the {self.kind} {entry.name!r} as {entry.value}"
        if entry.group == self._old:
            warnings.warn(
                f"{where} under the entry-point group {self._old!r}, which is {self.group!r} now and goes in "
                "0.3",
                FutureWarning,
                stacklevel=4,
            )
        module, _, attributes = entry.value.partition(":")
        try:
            found = functools.reduce(getattr, attributes.split("."), importlib.import_module(module))
        except (Exception, SystemExit) as error:  # whatever another package does as it is imported
            raise PluginError(
                f"{where}, which cannot be loaded ({type(error).__name__}: {error}): mend that package, or "
                "uninstall it"
            ) from error
        if wrong := self._wrong(entry.name, found):
            raise PluginError(f"{where}, {wrong}")
        return found  # type: ignore[return-value]  # as `wrong` has seen

    def _others(self) -> Mapping[str, list[EntryPoint]]:
        return _registered(self.group, self._old, tuple(sys.path))


@functools.lru_cache(maxsize=16)
def _registered(group: str, old: str | None, path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """The entry points of a group by name; of the old one, those that the group has not."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, []).append(entry)
    for entry in entry_points(group=old) if old else ():
        found.setdefault(entry.name, [entry])
    return found


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a package"
