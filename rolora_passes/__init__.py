"""Compiler-style passes over torch.export graphs of language models.

graph = apply_passes(capture(model), [FuseNorm(), Rotate(), AddLoRA()])
to_executorch(graph, "model.pte")
"""

from rolora_passes.add_lora import AddLoRA
from rolora_passes.fold_constants import FoldConstants
from rolora_passes.fuse_norm import FuseNorm
from rolora_passes.insert_hadamard import InsertHadamard
from rolora_passes.manager import Record, apply_passes, history
from rolora_passes.merge_lora import MergeLoRA
from rolora_passes.passes import Pass, Report
from rolora_passes.quantize_activations import QuantizeActivations
from rolora_passes.quantize_embedding import QuantizeEmbedding
from rolora_passes.quantize_weights import QuantizeWeights
from rolora_passes.rotate import Rotate
from rolora_passes.version import __version__

__all__ = [
    "AddLoRA",
    "FoldConstants",
    "FuseNorm",
    "InsertHadamard",
    "MergeLoRA",
    "Pass",
    "QuantizeActivations",
    "QuantizeEmbedding",
    "QuantizeWeights",
    "Record",
    "Report",
    "Rotate",
    "__version__",
    "apply_passes",
    "history",
]
