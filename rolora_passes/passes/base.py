"""What a pass is: a frozen dataclass of options that rewrites a copy of a graph and says what it did."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.info import Report as Report
from rolora_passes.graphs.verify import verify_same


@dataclass(frozen=True)
class Calibration:
    """What passes that look at data are given.

    Attributes:
        tokens: int64 [N, S], N windows of S tokens, on any device: they go to where the graph is computed.
        work: a folder for what a pass has finished, so that a run that was killed goes on from there;
            None to keep nothing.
        on_progress: called with the pass, how much is done, and of how much.
        reference: the graph before the first pass that rounds, what training distills; `apply_passes` gives
            it to a pass that stands in one list with that one.
        labels: int64 [N, S], the tokens that training is to predict, -100 elsewhere; None: all of them.
    """

    tokens: Tensor
    work: Path | None = None
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None
    reference: fx.GraphModule | None = None
    labels: Tensor | None = None


Kind = Literal["exact", "lossy", "trained"]


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses set the class attributes and implement `run`.

    Class attributes:
        name: in recipes, on the command line and in reports; if none is set, `FuseNorm` is `fuse-norm`.
        kind: "exact" keeps the function up to rounding, and is verified; "lossy" puts values on a grid;
            "trained" changes the function by learning, or adds what was learned. A property where options
            decide.
        requires, forbids: facts (`rolora_passes.graphs.facts`) that must hold before, and must not.
        ensures, removes: facts that hold after, if the pass found a site, and that no longer do.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    ensures: ClassVar[tuple[str, ...]] = ()
    forbids: ClassVar[tuple[str, ...]] = ()
    removes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__)
            cls.name = words.lower()
        kind = vars(cls).get("kind", "exact")
        if isinstance(kind, str) and kind not in get_args(Kind):
            raise PassError(f"{cls.name}: expected a kind of {', '.join(get_args(Kind))}, found {kind!r}")

    @property
    def exact(self) -> bool:
        """Whether the pass, with these options, keeps the function: its `kind` is "exact"."""
        return self.kind == "exact"

    @property
    def needs_calibration(self) -> bool:
        """Whether the pass, with these options, looks at data: `calibrate` is then called, not `run`."""
        return False

    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        return {
            f.name: value
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
            and not (f.default_factory is not dataclasses.MISSING and value == f.default_factory())
        }

    def run(self, graph: fx.GraphModule) -> Report:
        """Rewrite the graph in place (it is a copy made for this pass)."""
        raise NotImplementedError

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        """Rewrite the graph in place, by what its values are on the calibration tokens."""
        raise NotImplementedError

    def verify(self, before: fx.GraphModule, after: fx.GraphModule, report: Report) -> float | None:
        """Check that the function is kept; returns the relative error of the logits, or None if the
        two graphs cannot be compared.

        Raises:
            VerificationError: it is not; says where it is lost.
        """
        return verify_same(before, after, self.name, report.moved)


def renamed(step: Pass, old: str, **options: Any) -> None:
    """Take an option as it was written in the version before: these stand for it, and a warning says so."""
    now = ", ".join(f"{key}: {value}" for key, value in options.items() if value is not None)
    warnings.warn(f"{step.name}: `{old}` is `{now}` now; the old spelling goes in 0.3", FutureWarning, 4)
    for key, value in options.items():
        object.__setattr__(step, key, value)
