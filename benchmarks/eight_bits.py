"""What rotation repairs where 8 bits are enough for the weights: KL to the float model, on real text."""

from __future__ import annotations

from common import captured, compare, options, tokens_of

from rolora_passes import (
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    Pass,
    QuantizeActivations,
    QuantizeWeights,
    Rotate,
    apply_passes,
)
from rolora_passes.graphs import run


def main() -> None:
    """Print KL (nats per token) and top-1 agreement over 64 tokens, with and without rotation."""
    arguments = options(__doc__ or "").parse_args()
    graph, tokenizer = captured(arguments.model)
    tokens = tokens_of(tokenizer, arguments.text, 64)
    expected = run(graph, tokens)
    rotations: dict[str, list[Pass]] = {"plain": [], "rotated": [Rotate(), InsertHadamard(r3=False)]}
    quantizers: dict[str, list[Pass]] = {
        "W8": [QuantizeWeights(bits=8, head=8)],
        "W8A8": [QuantizeWeights(bits=8, head=8), QuantizeActivations()],
        "W4 (head in float)": [QuantizeWeights(head=None)],
    }
    for name, quantize in quantizers.items():
        for basis, rotate in rotations.items():
            passes = [FuseNorm(), *rotate, *quantize, FoldConstants()]
            kl, top = compare(run(apply_passes(graph, passes, verify=False), tokens), expected)
            print(f"{name:20}{basis:10}{kl:10.2e}{top:8.1%}", flush=True)


if __name__ == "__main__":
    main()
