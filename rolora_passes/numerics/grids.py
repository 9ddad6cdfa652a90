"""The grids that weights are rounded onto, by name: ours, and those that other packages register.

A package registers the function that makes a table (`numerics.codebooks`) under the entry-point group
`rolora_passes.grids`:

    [project.entry-points."rolora_passes.grids"]
    acme-ternary = "acme.grids:ternary"
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rolora_passes.errors import PassError
from rolora_passes.numerics.affine import Integers
from rolora_passes.numerics.codebooks import TABLES, Codebook
from rolora_passes.plugins import Registry

Grid = Integers | Codebook

BITS = range(2, 9)


def _wrong(name: str, found: object) -> str | None:
    if not callable(found):
        return "which is no function of the bits that makes a table"
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        return "whose name has to be lower-case letters, digits and hyphens"
    return None


GRIDS: Registry[Callable[..., Any]] = Registry(
    "grid", "rolora_passes.grids", lambda: {"int": Integers, **TABLES}, _wrong
)
"""What makes each grid: `Integers`, or a table of the bits."""


def make_grid(
    name: str, bits: int, group_size: int | None, symmetric: bool = True, clip_search: bool = False
) -> Grid:
    """A grid by name.

    Args:
        bits: 2 to 8.
        group_size: input channels that share a scale; None: one scale per output channel.
        symmetric, clip_search: of "int"; a table has no zero point, and no range to search.

    Raises:
        PassError: no such grid, or none of so many bits; options that a table does not have.
    """
    maker = GRIDS[name]
    if maker is Integers:
        return Integers(bits, group_size, symmetric, clip_search)
    if not symmetric or clip_search:
        raise PassError(
            "a codebook has no zero points and no clip search: leave symmetric and clip_search out with "
            f"grid {name!r}"
        )
    return Codebook(name, bits, group_size, codebook(name, bits))


def codebook(name: str, bits: int) -> Tensor:
    """The table of a grid of so many bits, checked: float32, ascending on [-1, 1].

    Raises:
        PassError: no such table, none of so many bits, or what another package made is no such table.
    """
    if bits not in BITS:
        raise PassError(f"expected a grid {name!r} of 2 to 8 bits, found {bits}")
    make = GRIDS[name]
    with GRIDS.telling(name):
        try:
            table = make(bits)
        except ValueError as error:
            raise PassError(f"the grid {name!r} has no {bits} bits: {error}") from error
    good = isinstance(table, Tensor) and table.dim() == 1 and 2 <= len(table) <= 2**bits
    if not good or not bool((table.diff() > 0).all()) or not float(table.abs().max()) <= 1:
        raise PassError(
            f"expected the grid {name!r}, of {GRIDS.origin(name) or 'rolora-passes'}, to have 2 to {2**bits} "
            f"ascending values on [-1, 1] at {bits} bits, found {table!r:.200}"
        )
    found: Tensor = table.to(torch.float32)
    return found
