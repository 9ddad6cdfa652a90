"""Compiler-style passes over torch.export graphs of language models.

graph = apply_passes(capture(model), [FuseNorm(), Rotate(), AddLoRA()])
to_executorch(graph, "model.pte")
"""

from rolora_passes.add_lora import AddLoRA
from rolora_passes.fold_constants import FoldConstants
from rolora_passes.fuse_norm import FuseNorm
from rolora_passes.insert_hadamard import InsertHadamard
from rolora_passes.insert_scaling import InsertScaling
from rolora_passes.learning import RILQ, LearnRotation, LearnScales, TuneLoRA
from rolora_passes.loftq import LoftQ
from rolora_passes.manager import Record, apply_passes, history
from rolora_passes.merge_lora import MergeLoRA
from rolora_passes.observe_activations import ObserveActivations
from rolora_passes.passes import Calibration, Pass, Report
from rolora_passes.quantize_activations import QuantizeActivations
from rolora_passes.quantize_embedding import QuantizeEmbedding
from rolora_passes.quantize_kv_cache import QuantizeKVCache
from rolora_passes.quantize_weights import QuantizeWeights
from rolora_passes.rotate import Rotate
from rolora_passes.smooth_quant import SmoothQuant
from rolora_passes.version import __version__

__all__ = [
    "RILQ",
    "AddLoRA",
    "Calibration",
    "FoldConstants",
    "FuseNorm",
    "InsertHadamard",
    "InsertScaling",
    "LearnRotation",
    "LearnScales",
    "LoftQ",
    "MergeLoRA",
    "ObserveActivations",
    "Pass",
    "QuantizeActivations",
    "QuantizeEmbedding",
    "QuantizeKVCache",
    "QuantizeWeights",
    "Record",
    "Report",
    "Rotate",
    "SmoothQuant",
    "TuneLoRA",
    "__version__",
    "apply_passes",
    "history",
]
