"""`rolora learn`: trains rotations under a recipe's quantizers."""

from __future__ import annotations

import argparse

from rolora_passes.cli.display import Display
from rolora_passes.cli.options import calibration_of, recipe_option
from rolora_passes.cli.training import tell, training_arguments, training_options

ORDER = 20
SUMMARY = "train a recipe's rotations, in one process or under torchrun"
EXAMPLES = (
    "rolora learn MODEL --recipe spinquant:W4A4KV4 --calibration c4.jsonl -o learned",
    "rolora learn MODEL --recipe dartquant:W4A4 --calibration c4.jsonl --set tokens=512 -o learned",
    "torchrun -m rolora_passes learn MODEL --recipe learned:W4A4KV4 --calibration c4.jsonl -o learned",
)


def add(parser: argparse.ArgumentParser) -> None:
    recipe_option(
        parser,
        "with a learn-rotation, such as spinquant:W4A4KV4 (end to end) or dartquant:W4A4 (layer by layer)",
        required=True,
    )
    training_options(parser)


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
