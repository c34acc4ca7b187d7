"""How the benchmark times calls and splits its time, on clocks of the tests' own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


class FakeGpu:
    """Events on a clock that only calls and spinning move; `host`: seconds the host takes to issue each call."""

    def __init__(self, monkeypatch, host):
        self.now, self.host, self.slept = 0.0, iter(host), []
        monkeypatch.setattr("sparge_compile.bench.timing.time.perf_counter", lambda: self.now)

    def call(self):
        self.now += next(self.host)

    def _sleep(self, cycles):
        self.slept.append(cycles)

    def Event(self, enable_timing):
        return SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda after: 7.0)


def test_a_call_is_measured_again_where_the_host_was_too_slow(monkeypatch):
    from sparge_compile.bench.timing import CYCLES_PER_SECOND, SHORTEST_START, EventStopwatch

    gpu = FakeGpu(monkeypatch, [3e-3, 3e-3, 3e-3])
    watch = EventStopwatch(gpu.call, torch.empty(4), cuda=gpu)
    assert watch().seconds == 7e-3 and watch().issue == pytest.approx(3e-3)
    assert gpu.slept == [int(start * CYCLES_PER_SECOND) for start in (SHORTEST_START, 6e-3, 6e-3)]


def test_a_call_that_waits_for_the_gpu_is_measured_all_the_same(monkeypatch):
    from sparge_compile.bench.timing import TRIES, EventStopwatch

    gpu = FakeGpu(monkeypatch, [1.0] * TRIES)
    assert EventStopwatch(gpu.call, torch.empty(4), cuda=gpu)().seconds == 7e-3


def test_rounds_interleave_and_end_at_the_deadline():
    from sparge_compile.bench.timing import FEWEST_ROUNDS, Timing, rounds

    order = []
    watches = {name: lambda name=name: order.append(name) or Timing(1.0) for name in "ab"}
    assert len(rounds(watches, 5)) == 5 and order == ["a", "b"] * 5
    assert len(rounds(watches, 5, deadline=0.0, clock=lambda: 1.0)) == FEWEST_ROUNDS
    assert len(rounds(watches, 1, deadline=0.0, clock=lambda: 1.0)) == 1
    assert rounds(watches, 0) == []


def test_the_budget_gives_what_is_left_by_work():
    from sparge_compile.bench.budget import SETTING_UP, Budget

    now = [100.0]
    budget = Budget(60, [0, SETTING_UP, 3 * SETTING_UP], clock=lambda: now[0])
    assert budget.deadline(0) == pytest.approx(100 + 60 / 7)
    now[0] = 101  # the first one was quick
    assert budget.deadline(1) == pytest.approx(101 + 59 * 2 / 6)
    now[0] = 150
    assert budget.deadline(2) == pytest.approx(160) and budget.left() == pytest.approx(10)
    now[0] = 160
    assert budget.deadline(2) is None


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_what_a_size_needs_is_known_from_its_first_queries(is_causal):
    from sparge_compile.bench.budget import seconds_needed
    from sparge_compile.bench.problem import smooth_problem
    from sparge_compile.bench.timing import Timing

    shapes = []

    def stopwatch(call):
        shapes.append(list(call().shape))
        return lambda: Timing(0.5)

    problem = smooth_problem(1024, 2, 8, is_causal=is_causal, precision="int8", dtype=torch.float32)
    one = 1.0 if is_causal else 2.0
    checks, variants = 1 + 2 + 2 * 2, 4
    assert seconds_needed(problem, stopwatch, 2, 2, repeats=15) == pytest.approx((checks + 3 * variants) * one)
    assert seconds_needed(problem, stopwatch, 2, 2, repeats=1) == pytest.approx((checks + variants) * one)
    assert shapes == [[1, 2, 256, 8]] * 2


def test_the_quartiles_are_those_of_the_rounds():
    from sparge_compile.bench.rows import quartiles

    assert quartiles([1.0, 2.0, 3.0, 4.0, 100.0]) == (2.0, 4.0)
    assert quartiles([3.0]) == (3.0, 3.0)
