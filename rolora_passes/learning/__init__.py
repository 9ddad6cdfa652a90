"""Learned rotations, scales and branches: passes that train, under the quantizers to come."""

from rolora_passes.learning.learn_rotation import LearnRotation
from rolora_passes.learning.learn_scales import LearnScales
from rolora_passes.learning.rilq import RILQ
from rolora_passes.learning.tune_lora import TuneLoRA

__all__ = ["RILQ", "LearnRotation", "LearnScales", "TuneLoRA"]
