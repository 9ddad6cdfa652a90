"""Lowering: targets, the whole way from a model to their programs, and what runs those."""

from rolora_passes.export.checkpoint import to_checkpoint, transform_model
from rolora_passes.export.compile import compile_model
from rolora_passes.export.executorch.lower import to_executorch
from rolora_passes.export.executorch.runner import generate
from rolora_passes.export.onnx.lower import to_onnx
from rolora_passes.export.target import Target, make_target
from rolora_passes.passes.add_kv_cache import AddKVCache

__all__ = [
    "AddKVCache", "Target", "compile_model", "generate", "make_target", "to_checkpoint", "to_executorch",
    "to_onnx", "transform_model",
]  # fmt: skip
