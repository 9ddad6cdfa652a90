"""Targets: what graphs are lowered to, and what runs that. One class a target; everything else asks them.

The package's own lie in `export/targets`, a file each, which has its class under the name `TARGET`. Another
package registers a class under the entry point group `rolora_passes.targets`, by the name that users type.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol

from torch import Tensor, fx

from rolora_passes.errors import LoweringError, PluginError, RoloraError
from rolora_passes.export import targets as own
from rolora_passes.extras import require
from rolora_passes.plugins import Registry

SHORTEST = 16
"""The fewest tokens of context that a program may hold."""

Score = Callable[[Tensor, int], Tensor]
"""tokens int64 [1, S], the position of the first -> logits [1, S or 1, V]; caches stay between calls."""
Encode = Callable[[str], Sequence[int]]
"""A text's tokens, without what begins or ends it; RuntimeError for what the vocabulary cannot write."""


class Lowered(Protocol):
    """What a lowering tells of itself: a dataclass, whose fields other than the path go into the manifest."""

    @property
    def path(self) -> Path:
        """The program."""

    def rows(self) -> list[str]:
        """Lines for people."""


@dataclass(frozen=True)
class Target(ABC):
    """A runtime, and how graphs are lowered to it.

    The fields of a subclass are its options: each has a default, and what the command line shows of it as
    `metadata={"help": .., "choices": (..)}`.

    Attributes:
        name: what users call it.
        program: the file, in a compiled folder, by which the target knows that it was lowered to.
        needs: modules that lowering imports; they are looked for before any time is spent.
        extra: of rolora-passes, which installs them.
        has_methods: a program may have other graphs beside `forward`, as adapters are.
    """

    name: ClassVar[str]
    program: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    has_methods: ClassVar[bool] = False

    def require(self) -> None:
        """Refuse to begin where what lowers is not installed.

        Raises:
            MissingExtraError: so it is.
        """
        for module in self.needs:
            require(module, self.extra)

    def require_methods(self, names: Iterable[str]) -> None:
        """Refuse names that methods beside `forward` cannot have.

        Raises:
            LoweringError: there are some.
        """
        for name in names:
            if not name.isidentifier() or name == "forward":
                raise LoweringError(
                    f"expected names of methods, identifiers other than forward, found {name!r}"
                )

    def can(self, graph: fx.GraphModule) -> RoloraError | None:
        """Why a graph cannot be lowered; None if it can.

        Args:
            graph: a stand-in (`export.preflight`): linears at the widths that the model's read, a table and
                an attention, as the recipe's quantizers leave them, with no layers or norms around them.
        """
        try:
            # A full disk matters when there is a program.
            with suppress(OSError), TemporaryDirectory() as folder:
                self.lower(graph, Path(folder), max_length=SHORTEST, check=False)
        except RoloraError as error:
            return error
        return None

    @abstractmethod
    def lower(
        self,
        graph: fx.GraphModule,
        folder: Path,
        *,
        max_length: int,
        methods: Mapping[str, fx.GraphModule] | None = None,
        check: bool = True,
    ) -> Lowered:
        """Write a graph's program, and what its runtime reads beside it, to a folder that is there.

        Args:
            graph: `forward(tokens [B, S], positions [B, S]) -> logits [B, S, V]`, as the passes left it.
            max_length: tokens of context the program is to hold.
            methods: more graphs, by name, for a target that `has_methods`.
            check: run what was written, and refuse a program that does not compute what the graph does.

        Raises:
            LoweringError: what cannot be lowered, and why.
        """

    @abstractmethod
    def score(self, folder: Path) -> Score:
        """Load the program in a folder, to give logits.

        Raises:
            RunError, RuntimeError: the runtime refuses it; a call may raise these too.
        """

    @abstractmethod
    def run(
        self,
        folder: Path,
        prompt: str,
        max_new_tokens: int,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
        begin: int = 0,
    ) -> str:
        """Continue a prompt with the runtime's own generator; returns the new text.

        Args:
            temperature: 0 takes the likeliest token every time.
            on_text: called with each piece of text as it is generated.
            begin: how many tokens that begin a text (BOS) are to be written before the prompt.

        Raises:
            RunError: the runtime fails.
        """

    def encode(self, folder: Path) -> Encode | None:
        """The tokenizer in a folder as the runtime loads it; None if the runtime has none of its own.

        Raises:
            LoweringError: the runtime cannot load it.
        """
        return None

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether a folder holds a program of this target."""
        return (folder / cls.program).is_file()


def _ours() -> dict[str, type[Target]]:
    names = [module.name for module in pkgutil.iter_modules(own.__path__)]
    return {name: import_module(f"{own.__name__}.{name}").TARGET for name in names}


def _wrong(name: str, found: object) -> str | None:
    if not isinstance(found, type) or not issubclass(found, Target):
        return "which is no target: expected a subclass of rolora_passes.export.Target"
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        return f"which does not implement {', '.join(missing)}"
    if bare := [f.name for f in fields(found) if f.default is MISSING and f.default_factory is MISSING]:
        return f"whose option {bare[0]} has no default"
    return None if found.name == name else f"which calls itself {found.name!r}: register it as that"


TARGETS: Registry[type[Target]] = Registry("target", "rolora_passes.targets", _ours, _wrong, LoweringError)
"""Every target by name, ours and other packages'."""


def loadable_targets() -> Iterator[type[Target]]:
    """The classes of all targets but those that cannot be loaded, which are told when they are asked for."""
    for name in TARGETS:
        with suppress(PluginError):
            yield TARGETS[name]


def make_target(target: Target | str, **options: Any) -> Target:
    """A target from itself or its name.

    Raises:
        LoweringError: no such target, or no such option of it.
        PluginError: another package's cannot be loaded.
    """
    if isinstance(target, Target):
        return target
    cls = TARGETS[target]
    known = [field.name for field in fields(cls)]
    for name in options:
        if name not in known:
            raise LoweringError(
                f"the target {target} has no option {name!r}; there are {', '.join(known) or 'none'}"
            )
    return cls(**options)
