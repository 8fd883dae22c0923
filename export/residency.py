"""How much of an engine is loaded at a time: all of it, or on small devices one component only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal

from export.backends import Runner
from export.specs import COMPONENTS

Residency = Literal["resident", "sequential"]


class Components:
    """The runners of an engine, by name.

    resident: all are loaded when the block is entered and stay until it is left.
    sequential: each is loaded when it is used and closed right after; it is then loaded again for
    every picture, which is the price of needing the memory of the largest one only.

    `load_seconds` has the time each took to load, the first time it was.
    """

    def __init__(self, open_runner: Callable[[str], Runner], residency: Residency) -> None:
        self._open, self.residency = open_runner, residency
        self._resident: dict[str, Runner] = {}
        self._stack = ExitStack()
        self.load_seconds: dict[str, float] = {}

    def __enter__(self) -> Components:
        if self.residency == "resident":
            with ExitStack() as stack:
                self._resident = {c: stack.enter_context(self._loaded(c)) for c in COMPONENTS}
                self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resident = {}
        self._stack.close()

    @contextmanager
    def use(self, component: str) -> Iterator[Runner]:
        """The component's runner, loaded while the block lasts."""
        if component in self._resident:
            yield self._resident[component]
        else:
            with self._loaded(component) as runner:
                yield runner

    @contextmanager
    def _loaded(self, component: str) -> Iterator[Runner]:
        runner = self._open(component)
        started = time.perf_counter()
        with runner:
            self.load_seconds.setdefault(component, time.perf_counter() - started)
            yield runner
