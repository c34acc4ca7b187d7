"""How long a call takes: by the wall clock where the host computes, by events on its stream where a GPU does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEWEST_ROUNDS = 3
FLUSH_BYTES = 2**28  # several times the second-level cache of any GPU
CYCLES_PER_SECOND = 3e9  # of a spinning GPU, at most: a slower clock only spins longer
SHORTEST_START, LONGEST_START = 0.2e-3, 20e-3  # seconds
TRIES = 4


@dataclass(frozen=True)
class Timing:
    """Seconds of one call; issue: what the host took to issue it, None where the host computes."""

    seconds: float
    issue: float | None = None


Stopwatch = Callable[[], Timing]
"""Runs its call once."""


def wall_clock(call: Callable[[], object]) -> Stopwatch:
    def measure() -> Timing:
        start = time.perf_counter()
        call()
        return Timing(time.perf_counter() - start)

    return measure


class EventStopwatch:
    """Time on the GPU alone, as in a CUDA graph or behind other work; caches hold nothing of the call.

    The GPU spins before the first event for twice what the host took to issue the call last time. Where the host was
    slower than that, the call is measured again; one that waits for the GPU itself is taken as it is.
    """

    def __init__(self, call: Callable[[], object], scratch: Tensor, cuda: Any = torch.cuda) -> None:
        """scratch: memory to overwrite before each call. cuda: what stands in for torch.cuda, in tests."""
        self._call, self._scratch, self._cuda = call, scratch, cuda
        self._start = SHORTEST_START

    def __call__(self) -> Timing:
        for _ in range(TRIES):
            start = self._start
            timing = self._once(start)
            assert timing.issue is not None
            self._start = min(max(2 * timing.issue, SHORTEST_START), LONGEST_START)
            if timing.issue < start or start == LONGEST_START:
                break
        return timing

    def _once(self, start: float) -> Timing:
        before, after = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        self._cuda._sleep(int(start * CYCLES_PER_SECOND))
        issued_from = time.perf_counter()
        before.record()
        self._call()
        after.record()
        issue = time.perf_counter() - issued_from
        after.synchronize()
        return Timing(before.elapsed_time(after) / 1e3, issue)


def event_stopwatches(device: torch.device) -> Callable[[Callable[[], object]], Stopwatch]:
    """Stopwatches of one GPU; they share the memory that flushes its cache."""
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    return lambda call: EventStopwatch(call, scratch)


def rounds(
    watches: Mapping[str, Stopwatch],
    repeats: int,
    deadline: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Timing]]:
    """Each call once a round, in turn, so that what else the machine does, and its clock, hits all of them.

    Ends after `repeats` rounds or at the deadline (of `clock`), but not before `FEWEST_ROUNDS` of the repeats.
    """
    measured: list[dict[str, Timing]] = []
    while len(measured) < repeats and (len(measured) < FEWEST_ROUNDS or clock() < deadline):
        measured.append({name: watch() for name, watch in watches.items()})
    return measured
