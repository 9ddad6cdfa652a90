# isort: skip_file
"""The passes of this package, a line each, in the order that recipes have them.

Another line is all that it takes: the registry and `rolora_passes` take every name from here. (Hence no
`from __future__`, which would be one.)
"""

from rolora_passes.passes.fuse_norm import FuseNorm as FuseNorm
from rolora_passes.passes.insert_scaling import InsertScaling as InsertScaling
from rolora_passes.passes.rotate import Rotate as Rotate
from rolora_passes.passes.insert_hadamard import InsertHadamard as InsertHadamard
from rolora_passes.passes.learn_rotation import LearnRotation as LearnRotation
from rolora_passes.passes.learn_scales import LearnScales as LearnScales
from rolora_passes.passes.add_lora import AddLoRA as AddLoRA
from rolora_passes.passes.tune_lora import TuneLoRA as TuneLoRA
from rolora_passes.passes.rilq import RILQ as RILQ
from rolora_passes.passes.loftq import LoftQ as LoftQ
from rolora_passes.passes.merge_lora import MergeLoRA as MergeLoRA
from rolora_passes.passes.observe_activations import ObserveActivations as ObserveActivations
from rolora_passes.passes.smooth_quant import SmoothQuant as SmoothQuant
from rolora_passes.passes.quantize_weights import QuantizeWeights as QuantizeWeights
from rolora_passes.passes.quantize_activations import QuantizeActivations as QuantizeActivations
from rolora_passes.passes.quantize_kv_cache import QuantizeKVCache as QuantizeKVCache
from rolora_passes.passes.quantize_embedding import QuantizeEmbedding as QuantizeEmbedding
from rolora_passes.passes.fold_constants import FoldConstants as FoldConstants
from rolora_passes.passes.add_kv_cache import AddKVCache as AddKVCache
