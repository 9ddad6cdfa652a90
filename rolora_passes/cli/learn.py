"""`rolora learn`: rotations trained under a recipe's quantizers."""

from __future__ import annotations

import argparse
from typing import Any

from rolora_passes.cli.display import Display
from rolora_passes.cli.options import calibration_of
from rolora_passes.cli.training import tell, training_arguments, training_options


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "learn", help="train a recipe's rotations; alone, or under torchrun -m rolora_passes learn …"
    )
    parser.add_argument("--recipe", required=True, help="spinquant:W4A4KV4, or a .yaml with learn-rotation")
    training_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.errors import PassError
    from rolora_passes.learning import processes
    from rolora_passes.recipes.learned import learn_rotations

    processes.join()
    with Display() as display:
        calibration = calibration_of(options, display)
        if calibration is None:
            raise PassError("learn-rotation looks at data: give --calibration TEXT (.txt or .jsonl)")
        known = training_arguments(options, display)
        record = learn_rotations(options.model, options.recipe, options.output, calibration, **known)
    error = record.report.notes["orthogonality_error"]
    tell(record, options.output, "matrices and scales", f"|RᵀR - 1| <= {error:.0e}")
