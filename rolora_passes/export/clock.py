"""How long the steps of a piece of work take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from rolora_passes.memory import release


class Clock:
    """Seconds by step, in the order of the steps; a step may be taken up again.

    Args:
        read: the time, in seconds.
        tell: called with the name of each step as it begins.
    """

    def __init__(
        self, read: Callable[[], float] = time.perf_counter, tell: Callable[[str], None] | None = None
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._read, self._tell = read, tell or (lambda name: None)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._tell(name)
        start = self._read()
        yield
        release()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + self._read() - start, 3)

    @contextmanager
    def stages(self, names: Mapping[str, str]) -> Iterator[Callable[[str], None]]:
        """Time work that says which stage begins, to the function given: a step each, by these names."""
        with ExitStack() as current:

            def begin(stage: str) -> None:
                current.close()
                current.enter_context(self.step(names[stage]))

            yield begin
