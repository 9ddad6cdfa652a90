"""Lowering to ExecuTorch, and running what was lowered."""

from rolora_passes.export.executorch.lower import to_executorch

__all__ = ["to_executorch"]
