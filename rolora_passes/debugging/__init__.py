"""Finding where a recipe loses accuracy: error tracking, bisection, ablation; and reproducers of failures."""

from rolora_passes.debugging.tracking import ErrorTrace, NodeError, TokenError, track_errors
from rolora_passes.debugging.twins import float_twin_recipe, with_float_twin

__all__ = [
    "ErrorTrace",
    "NodeError",
    "TokenError",
    "float_twin_recipe",
    "track_errors",
    "with_float_twin",
]
