"""A Hugging Face checkpoint of what passes made of a model."""

from rolora_passes.export.checkpoint.transform import Transformed, to_checkpoint, transform_model

__all__ = ["Transformed", "to_checkpoint", "transform_model"]
