"""How far the exact passes move the logits of every tiny architecture of the tests, in four types.

Logits are compared as verification does, in float64 whatever the type: what is left is the rounding of folded
parameters to their own type.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    MergeLoRA,
    Rotate,
    apply_passes,
    history,
)
from rolora_passes.errors import CaptureError
from rolora_passes.graphs import capture

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from architectures import CONFIGS, OTHERS, tiny

PASSES = [FuseNorm(), Rotate(), InsertHadamard(), AddLoRA(rank=2), MergeLoRA(), FoldConstants()]
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cell(name: str, dtype: torch.dtype) -> str:
    """The largest relative error before folding, that of folding, and how many sites the passes changed."""
    try:
        graph = capture(tiny(name, dtype))
    except CaptureError:  # BART and its kin branch on overflow in float16
        return "refused"
    done = history(apply_passes(graph, PASSES))
    *exact, folded = [record.error or 0.0 for record in done]
    return f"{max(exact):.0e} {folded:.0e} {sum(len(record.report.changed) for record in done[:-1])}"


def main() -> None:
    """Print a row for every architecture."""
    print("largest relative error of the passes before folding, of folding, and sites changed before folding")
    print(f"{'':16}" + "".join(f"{str(dtype).removeprefix('torch.'):>20}" for dtype in TYPES))
    for name in [*CONFIGS, *OTHERS]:
        print(f"{name:16}" + "".join(f"{cell(name, dtype):>20}" for dtype in TYPES), flush=True)


if __name__ == "__main__":
    main()
