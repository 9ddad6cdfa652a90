"""The passes, one file each; what a pass is; and the manager that applies them."""

from rolora_passes.passes.base import Calibration, Pass, Report

__all__ = ["Calibration", "Pass", "Report"]
