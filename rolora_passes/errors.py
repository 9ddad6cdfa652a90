"""Errors a user can act on. Each message says what was expected, what was found, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RoloraError(Exception):
    """Base of every error this package raises on purpose."""


class CaptureError(RoloraError):
    """The model cannot be captured faithfully."""


class GraphFormatError(RoloraError):
    """A graph, or a saved graph, is not what this package writes."""


class PassOrderError(RoloraError):
    """A pass was asked for where its requirements do not hold."""


class PassError(RoloraError):
    """A pass cannot do what its options ask on this graph."""


class PluginError(PassError):
    """A name that nothing has, or what another package registers cannot be used."""


class NoSiteWarning(UserWarning):
    """A pass found nothing to change, and what it ensures does not hold."""


class VerificationError(RoloraError):
    """A pass that promises to keep the function changed it."""


class LoweringError(RoloraError):
    """The graph cannot be lowered to the target."""


class MissingExtraError(RoloraError, ImportError):
    """An optional dependency is not installed."""


class SpillError(RoloraError):
    """The folder for weights that do not fit into memory is full, or cannot be written to."""


class SourceError(RoloraError):
    """A file of weights is not any more what it was when it was opened."""


class WorkError(RoloraError):
    """A folder for finished work is in use by another process, or cannot be written to."""


class RunError(RoloraError):
    """A compiled program cannot be run as asked."""


class DataError(RoloraError):
    """A text, or a file of examples, is not what it should be."""


class EvaluationError(RoloraError):
    """A model cannot be evaluated as asked."""


class DeviceError(RoloraError):
    """torch has no such device here."""


class QualityError(RoloraError):
    """A quantized graph says less of a text than no model would."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a CPU, torch says so by the text of a RuntimeError alone."""
    kinds = ("OutOfMemoryError", "MemoryError")
    texts = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "out of memory")
    known = any(kind.__name__ in kinds for kind in type(error).__mro__)
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))


def nearest(name: str, known: Iterable[str]) -> str:
    """A name that may have been meant, for the end of a message; nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(error: BaseException, length: int = 300) -> str:
    """Another library's error for a message of ours: its type and the beginning of what it says."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= length else text[:length] + ' …'}"
