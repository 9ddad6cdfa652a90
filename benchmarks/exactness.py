"""How far the exact passes move the logits of a real model, in float32 and float64."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import captured, options, tokens_of

from rolora_passes import FoldConstants, FuseNorm, InsertHadamard, Rotate, apply_passes
from rolora_passes.graphs import convert, run, save_rotations
from rolora_passes.graphs.verify import relative_error


def main() -> None:
    """Print the largest difference of the logits, relative to the largest logit, per kind of rotation."""
    arguments = options(__doc__ or "").parse_args()
    graph, tokenizer = captured(arguments.model)
    tokens = tokens_of(tokenizer, arguments.text, 64)
    with tempfile.TemporaryDirectory() as folder:
        drawn = apply_passes(
            graph, [FuseNorm(), Rotate(residual="orthogonal", heads="orthogonal", seed=7)], verify=False
        )
        save_rotations(drawn, folder)
        kinds = {
            "hadamard": Rotate(),
            "orthogonal": Rotate(residual="orthogonal", heads="orthogonal"),
            "given (R.bin)": Rotate(given=Path(folder) / "R.bin"),
        }
        for dtype in (torch.float32, torch.float64):
            plain = convert(graph, dtype)
            expected = run(plain, tokens)
            for name, rotate in kinds.items():
                passes = [FuseNorm(), rotate, InsertHadamard(), FoldConstants()]
                found = run(apply_passes(plain, passes, verify=False), tokens)
                print(
                    f"{str(dtype).removeprefix('torch.'):8} {name:14} {relative_error(found, expected):.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
