"""Lowering: ExecuTorch and ONNX, key-value caches and kernel-specific rewrites, runners."""

from rolora_passes.export.add_kv_cache import AddKVCache
from rolora_passes.export.compile import compile_model
from rolora_passes.export.executorch import to_executorch
from rolora_passes.export.onnx import to_onnx
from rolora_passes.export.runner import generate

__all__ = ["AddKVCache", "compile_model", "generate", "to_executorch", "to_onnx"]
