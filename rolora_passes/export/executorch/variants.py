"""Operators that ExecuTorch cannot call."""

from __future__ import annotations

from torch import fx
from torch._C import DispatchKey
from torch._ops import OpOverload

from rolora_passes.errors import LoweringError
from rolora_passes.graphs.nodes import BARE
from rolora_passes.graphs.sources import source_of


def require_variants(graph: fx.GraphModule) -> None:
    """Refuse other packages' operators that are one piece, and that ExecuTorch has no form of to call.

    An operator made of torch's own is taken apart; one that is not needs a variant that writes to memory that
    it is given (`out`), which a kernel of the runtime implements.

    Raises:
        LoweringError: names them, and the lines of the model that they come from.
    """
    lacking = [
        node for node in graph.graph.nodes if isinstance(node.target, OpOverload) and _lacks(node.target)
    ]
    if lacking:
        lines = "\n".join(f"  {node.target}: `{node.name}`{source_of(node)}" for node in lacking)
        raise LoweringError(
            f"{len(lacking)} nodes have operators that ExecuTorch has no out variant of; express them by "
            "others, give their records an implementation made of torch's operators, or register "
            f"a variant, and a kernel with the runtime:\n{lines}"
        )


def _lacks(operator: OpOverload) -> bool:
    from executorch.exir.operator.convert import to_out_variant

    if operator.namespace in BARE or operator.has_kernel_for_dispatch_key(
        DispatchKey.CompositeImplicitAutograd
    ):
        return False
    try:
        to_out_variant(operator)
    except (AssertionError, RuntimeError):
        return True
    return False
