"""Compiler-style passes over torch.export graphs of language models.

graph = apply_passes(capture(model), [FuseNorm(), Rotate(), AddLoRA()])
to_executorch(graph, "model.pte")
"""

from rolora_passes import moved
from rolora_passes.passes.add_lora import AddLoRA
from rolora_passes.passes.base import Calibration, Pass, Report
from rolora_passes.passes.fold_constants import FoldConstants
from rolora_passes.passes.fuse_norm import FuseNorm
from rolora_passes.passes.insert_hadamard import InsertHadamard
from rolora_passes.passes.insert_scaling import InsertScaling
from rolora_passes.passes.learn_rotation import LearnRotation
from rolora_passes.passes.learn_scales import LearnScales
from rolora_passes.passes.loftq import LoftQ
from rolora_passes.passes.manager import Record, apply_passes, history
from rolora_passes.passes.merge_lora import MergeLoRA
from rolora_passes.passes.observe_activations import ObserveActivations
from rolora_passes.passes.quantize_activations import QuantizeActivations
from rolora_passes.passes.quantize_embedding import QuantizeEmbedding
from rolora_passes.passes.quantize_kv_cache import QuantizeKVCache
from rolora_passes.passes.quantize_weights import QuantizeWeights
from rolora_passes.passes.rilq import RILQ
from rolora_passes.passes.rotate import Rotate
from rolora_passes.passes.smooth_quant import SmoothQuant
from rolora_passes.passes.tune_lora import TuneLoRA
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

moved.install()
