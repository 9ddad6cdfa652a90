"""Lowering: ExecuTorch and ONNX, key-value caches and kernel-specific rewrites, runners."""

from rolora_passes.export.compile import compile_model
from rolora_passes.export.executorch.lower import to_executorch
from rolora_passes.export.executorch.runner import generate
from rolora_passes.export.onnx.lower import to_onnx
from rolora_passes.passes.add_kv_cache import AddKVCache

__all__ = ["AddKVCache", "compile_model", "generate", "to_executorch", "to_onnx"]
