"""Basis inference: which axes of a graph may share another basis, and what is known to move with them."""

from rolora_passes.moved import old_names

old_names(globals())
