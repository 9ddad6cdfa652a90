"""Compiler-style passes over torch.export graphs of language models.

graph = apply_passes(capture(model), [FuseNorm(), Rotate(), AddLoRA()])
to_executorch(graph, "model.pte")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rolora_passes import moved
from rolora_passes.version import __version__ as __version__

if TYPE_CHECKING:
    from rolora_passes.passes.base import Calibration as Calibration
    from rolora_passes.passes.base import Pass as Pass
    from rolora_passes.passes.base import Report as Report
    from rolora_passes.passes.catalogue import *  # noqa: F403
    from rolora_passes.passes.manager import Record as Record
    from rolora_passes.passes.manager import apply_passes as apply_passes
    from rolora_passes.passes.manager import history as history

_PLACES = {
    **dict.fromkeys(("Calibration", "Pass", "Report"), "rolora_passes.passes.base"),
    **dict.fromkeys(("Record", "apply_passes", "history"), "rolora_passes.passes.manager"),
}
_CATALOGUE = "rolora_passes.passes.catalogue"


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is first used: torch takes seconds, and help does without."""
    if name == "__all__":
        passes = [known for known in vars(import_module(_CATALOGUE)) if not known.startswith("_")]
        return sorted([*_PLACES, *passes, "__version__"])
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name[:1].isupper() and hasattr(catalogue := import_module(_CATALOGUE), name):
        return getattr(catalogue, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]


moved.install()
