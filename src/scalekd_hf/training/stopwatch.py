"""The time that a run has trained for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


__all__ = ["Stopwatch"]


class Stopwatch:
    """Seconds of training, over all calls of `train` that went on from one another."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None

    @property
    def is_running(self) -> bool:
        """Whether training goes on."""
        return self._started is not None

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._started if self._started is not None else 0.0)

    def reset(self, seconds: float) -> None:
        """A run begins, or goes on after so many seconds."""
        self._before = seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        self._started = time.monotonic()
        try:
            yield
        finally:
            self._before, self._started = self.seconds, None
