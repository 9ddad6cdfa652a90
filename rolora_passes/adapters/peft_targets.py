"""Which modules a PEFT configuration adapts, by PEFT's rules over their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from rolora_passes.errors import PassError


class Targets:
    """`target_modules`, less `exclude_modules` and `modules_to_save`, in the layers that are meant.

    Args:
        values: of the configuration.
        refuse: makes the error for an entry: its key, what was expected, what was found.

    Raises:
        PassError: an entry of another type than PEFT's, or one that is not a regular expression.
    """

    def __init__(self, values: Mapping[str, Any], refuse: Callable[[str, str, Any], PassError]) -> None:
        self.values, self.refuse = values, refuse
        for key in ("target_modules", "exclude_modules"):
            self._require(key, str, list)
        self._require("modules_to_save", list)
        self._require("layers_pattern", str, list)
        layers = values.get("layers_to_transform")
        found = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if any(type(layer) is not int for layer in found):
            raise refuse("layers_to_transform", "numbers of layers", layers)
        self.layers = found

    def _require(self, key: str, *kinds: type) -> None:
        value = self.values.get(key)
        texts = all(isinstance(v, str) for v in value) if isinstance(value, list) else True
        if value is not None and not (isinstance(value, kinds) and texts):
            raise self.refuse(key, "names of modules", value)

    def cover(self, module: str) -> bool:
        """Whether PEFT gives a module a branch."""
        targets = self.values.get("target_modules")
        if targets is None:
            expected = "names of modules, or a regular expression (PEFT guesses them by the kind of model)"
            raise self.refuse("target_modules", expected, targets)
        if self.exclude(module):
            return False
        if isinstance(targets, str):
            whole = targets.lower() == "all-linear"
            return whole or self._match("target_modules", f"(?:{targets})$", module) is not None
        return module in targets or (_ends(module, targets) and self._in_layers(module))

    def exclude(self, module: str) -> bool:
        """Whether PEFT leaves out a module that `target_modules` may name."""
        excluded = self.values.get("exclude_modules") or []
        if isinstance(excluded, str):
            return self._match("exclude_modules", f"(?:{excluded})$", module) is not None
        saved = self.values.get("modules_to_save") or []
        return _ends(module, excluded) or any(
            self._match("modules_to_save", rf"(^|.*\.){name}($|\..*)", module) for name in saved
        )

    def require(self, modules: Collection[str], replaced: Collection[str]) -> None:
        """Refuse branches of modules that are not meant, and names that stand for no tensor at all."""
        for module in modules:
            if not self.cover(module):
                expected = f"names that cover every branch in the file: PEFT ignores that of {module[:120]}"
                raise self.refuse("target_modules", expected, self.values["target_modules"])
        for key, found in (("target_modules", [*modules, *replaced]), ("modules_to_save", replaced)):
            names = self.values.get(key)
            for name in names if isinstance(names, list) else []:
                left = key == "target_modules" and self._may_exclude(name)
                if not left and not any(f".{name}." in f".{other}." for other in found):
                    raise self.refuse(key, "names of modules whose tensors are in the file", name)

    def _may_exclude(self, name: str) -> bool:
        """Whether all that a name of `target_modules` means may be left out again."""
        excluded = self.values.get("exclude_modules") or []
        return isinstance(excluded, str) or self.exclude(name) or any(_ends(e, [name]) for e in excluded)

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        given = self.values.get("layers_pattern") or []
        patterns = [given] if isinstance(given, str) else given
        tries = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        matched = (self._match("layers_pattern", pattern, module) for pattern in tries)
        layer = next((m.group(m.re.groups) for m in matched if m), None)
        return layer is not None and int(layer) in self.layers

    def _match(self, key: str, pattern: str, text: str) -> re.Match[str] | None:
        try:
            return re.match(pattern, text)
        except (re.error, RecursionError, OverflowError) as error:
            raise self.refuse(key, "a regular expression", f"{self.values[key]}: {error}") from error


def _ends(module: str, names: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)
