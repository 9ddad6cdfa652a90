"""Training what a graph leaves open: orthogonal matrices on the Stiefel manifold, and positive scales."""

from rolora_passes.learning.learn_rotation import LearnRotation as LearnRotation
from rolora_passes.learning.learn_scales import LearnScales as LearnScales
