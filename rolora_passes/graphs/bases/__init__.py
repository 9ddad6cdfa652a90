"""Basis inference: which axes of a graph may share another basis, and what is known to move with them."""

from rolora_passes.graphs.bases.inference import infer_bases

__all__ = ["infer_bases"]
