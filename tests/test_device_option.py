"""--device: the same figures on a device, and one that is not there is refused by name."""

from __future__ import annotations

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]
COMMANDS = ("compile", "eval", "learn", "tune", "diagnose", "inspect")
