"""Basis inference: which axes of a graph may share another basis, and what is known to move with them."""
