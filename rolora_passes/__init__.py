"""Compiler-style passes over torch.export graphs of language models.

graph = apply_passes(capture(model), [FuseNorm(), Rotate(), AddLoRA()])
to_executorch(graph, "model.pte")
"""

from rolora_passes import moved
from rolora_passes.passes.base import Calibration as Calibration
from rolora_passes.passes.base import Pass as Pass
from rolora_passes.passes.base import Report as Report
from rolora_passes.passes.catalogue import *  # noqa: F403
from rolora_passes.passes.manager import Record as Record
from rolora_passes.passes.manager import apply_passes as apply_passes
from rolora_passes.passes.manager import history as history
from rolora_passes.version import __version__ as __version__

moved.install()
