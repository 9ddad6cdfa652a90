"""Operators: everything the library knows of each, in one record, from which everything else asks.

Importing it defines `torch.ops.rolora`, the few operators of the canonical form that ATen has no single node
for. Each is a composite over ATen: it runs eagerly on any device, differentiates, works on tensors without
values, and stays one node under `torch.export`.
"""

from rolora_passes.graphs.operators.record import Operator, Trait
from rolora_passes.graphs.operators.registry import OURS, has, operator_of, operators

__all__ = ["OURS", "Operator", "Trait", "has", "operator_of", "operators"]
