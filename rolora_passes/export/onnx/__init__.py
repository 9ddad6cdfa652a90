"""Lowering to ONNX, and running what was lowered."""

from rolora_passes.export.onnx.lower import to_onnx

__all__ = ["to_onnx"]
