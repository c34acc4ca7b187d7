"""How the time of a run is split over its shapes, and what one of them needs at least."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from sparge_compile.bench.peers import dense
from sparge_compile.bench.problem import Problem
from sparge_compile.bench.timing import FEWEST_ROUNDS, Stopwatch

PROBE_QUERIES = 256
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

    def left(self) -> float:
        """Seconds."""
        return self._end - self._clock()

    def deadline(self, shape: int) -> float | None:
        """When the shape of this index, which starts now, should end; None: nothing is left, skip it."""
        now = self._clock()
        if now >= self._end:
            return None
        return now + (self._end - now) * self._weights[shape] / sum(self._weights[shape:])


def seconds_needed(
    problem: Problem,
    stopwatch: Callable[[Callable[[], object]], Stopwatch],
    dense_peers: int,
    sparse_rows: int,
    repeats: int,
) -> float:
    """About what checking and the fewest rounds take, were every call as slow as dense attention."""
    # Checked once, sparse ones counted too; and what all are compared with.
    checking = 1 + dense_peers + 2 * sparse_rows
    timing = min(repeats, FEWEST_ROUNDS) * (dense_peers + sparse_rows)
    return (checking + timing) * _dense_seconds(problem, stopwatch)


def _dense_seconds(problem: Problem, stopwatch: Callable[[Callable[[], object]], Stopwatch]) -> float:
    """Of one call, by that of its first queries: the time grows with their number."""
    first = replace(problem, q=problem.q[:, :, :PROBE_QUERIES].contiguous(), is_causal=False)
    watch = stopwatch(dense(problem.dtype)(first))
    taken = min(watch().seconds for _ in range(2))  # the first one warms up
    return taken * problem.dense_flops / first.dense_flops
