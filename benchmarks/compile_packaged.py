"""Compile the packaged model by a recipe, printing where the lowering's CPU seconds go."""

from __future__ import annotations

import argparse
from pathlib import Path

from common import options

from rolora_passes.export import compile_model


def main() -> None:
    """Compile and print sizes and seconds."""
    parser: argparse.ArgumentParser = options(__doc__ or "")
    parser.add_argument("--recipe", default="rotated-8da4w")
    parser.add_argument("--target", default="executorch", choices=("executorch", "onnx"))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.model is None:
        from packaged_model import packaged_model

        arguments.model = str(packaged_model())
    compiled = compile_model(
        arguments.model, arguments.recipe, arguments.output, targets=(arguments.target,), verify=False
    )
    print(f"{arguments.recipe}: weights {compiled.weights.megabytes:.1f} MB in the graph")
    lowering = compiled.lowerings[arguments.target]
    print("\n".join(lowering.rows()))
    print(f"seconds of lowering: {lowering.seconds}")


if __name__ == "__main__":
    main()
