"""How the time of a run is split over its shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

SETTING_UP = 2e13
"""What compiling and checking one shape takes on a GPU, in operations of dense attention that take as long."""


class Budget:
    """Seconds from now on for shapes that do `work` operations each; what one shape leaves over goes to the others."""

    def __init__(
        self,
        seconds: float,
        work: Sequence[float],
        clock: Callable[[], float] = time.monotonic,
        setting_up: float = SETTING_UP,
    ) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._weights = [setting_up + operations for operations in work]

    def deadline(self, shape: int) -> float | None:
        """When the shape of this index, which starts now, should end; None: nothing is left, skip it."""
        now = self._clock()
        if now >= self._end:
            return None
        return now + (self._end - now) * self._weights[shape] / sum(self._weights[shape:])
