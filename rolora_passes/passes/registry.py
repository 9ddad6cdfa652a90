"""Passes by name, and passes made of what a recipe says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rolora_passes.errors import PassError
from rolora_passes.passes.base import Pass
from rolora_passes.plugins import Registry

PassLike = Pass | str | Mapping[str, Any]


def _ours() -> dict[str, type[Pass]]:
    # By name: some passes apply others, and could not import what imports all.
    catalogue = vars(import_module("rolora_passes.passes.catalogue"))
    classes = [found for found in catalogue.values() if isinstance(found, type) and issubclass(found, Pass)]
    return {cls.name: cls for cls in classes}


def _wrong(name: str, found: object) -> str | None:
    if not isinstance(found, type) or not issubclass(found, Pass) or not dataclasses.is_dataclass(found):
        return "which is no pass: expected a frozen dataclass that derives from rolora_passes.Pass"
    if found.name != name:
        return (
            f"which calls itself {found.name!r}, the name that recipes would have: register it as that, or "
            f"set `name: ClassVar[str] = {name!r}` in it"
        )
    return None


PASSES: Registry[type[Pass]] = Registry("pass", "rolora_passes.passes", _ours, _wrong, old="rolora_passes")
"""Every pass by name, ours and other packages'."""


def make_pass(spec: Pass | str | Mapping[str, Any]) -> Pass:
    """A pass from itself, its name, or {name: options}.

    Raises:
        PassError: not one of these, an unknown name, or an option the pass does not have.
    """
    if isinstance(spec, Pass):
        return spec
    if isinstance(spec, str):
        return PASSES[spec]()
    if not isinstance(spec, Mapping) or len(spec) != 1:
        call = f"; write {spec.__name__}()" if isinstance(spec, type) and issubclass(spec, Pass) else ""
        raise PassError(f"expected a pass, a name, or one {{name: options}}, found {spec!r}{call}")
    ((name, options),) = spec.items()
    cls = PASSES[name]
    _check_options(cls, {} if options is None else options)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in (options or {}).items()}
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:  # what a class outside may raise of an option
        raise PassError(f"{name}: {error}") from error


def _check_options(cls: type[Pass], options: Any) -> None:
    """That options, as a file gives them, exist and are of the declared types."""
    name = cls.name
    known = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(options, Mapping):
        raise PassError(f"{name}: expected {{option: value}}, found {options!r}; options are {known}")
    hints = get_type_hints(cls)
    for key, value in options.items():
        if key not in known:
            raise PassError(f"{name} has no option {key!r}; there are {', '.join(known) or 'none'}")
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            found = f"found {value!r}; see `rolora passes {name}`"
            raise PassError(f"{name}: expected {key} to be {wanted}, {found}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as written; a list may stand for a tuple, an int for a float."""
    origin = get_origin(hint)
    if hint is Any or origin is Literal:  # the pass itself says which words it takes
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    accepted = {float: (int, float), tuple: (list, tuple)}.get(origin or hint, origin or hint)
    return isinstance(value, accepted)
