"""Calls of delegates that were not made from a program ExecuTorch could trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rolora_passes.graphs.shapes import Shape

call_delegate = torch.ops.higher_order.executorch_call_delegate


class Signature:
    """What ExecuTorch asks of a delegate's original program: result sizes, and a graph without nodes."""

    def __init__(self, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> None:
        self.outputs = outputs
        self.length = next(((i, s.index(None)) for i, s in enumerate(inputs) if None in s), None)
        self.graph = fx.Graph()
        self.graph.output([None] * len(outputs))

    def module(self) -> Any:
        return self._results

    def _results(self, *inputs: Tensor) -> list[Tensor]:
        """Empty results for these inputs."""
        length = None if self.length is None else inputs[self.length[0]].shape[self.length[1]]
        sizes: Any = [[length if d is None else d for d in shape] for shape in self.outputs]
        return [torch.empty(size) for size in sizes]
