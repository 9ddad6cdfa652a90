"""Graphs: capture, canonical form, basis inference, parameters, verification, inspection."""

from rolora_passes.graphs.bases.inference import infer_bases
from rolora_passes.graphs.bases.rotations import load_rotations, save_rotations
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.devices import computing_on
from rolora_passes.graphs.dtypes import convert, to_device
from rolora_passes.graphs.running import run
from rolora_passes.graphs.serialize import load_graph, save_graph

__all__ = [
    "capture",
    "computing_on",
    "convert",
    "infer_bases",
    "load_graph",
    "load_rotations",
    "run",
    "save_graph",
    "save_rotations",
    "to_device",
]
