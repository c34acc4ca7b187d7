"""The doctor's line on speed: the device's own peers, and the words of `bench`."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch

from sparge_compile.bench import cpu_target
from sparge_compile.bench.peers import CPU_PEERS, OURS
from sparge_compile.bench.timing import Timing
from sparge_compile.command import speed
from sparge_kernels import ops

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(ops.unavailable(CPU) is not None, reason="needs the CPU kernel")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(speed, "TOKENS", 256)
    monkeypatch.setattr(speed, "busy", lambda: None)


def measure(*seconds, peers=CPU_PEERS, **changes):
    """With peers that take this long, in turn."""
    clock = itertools.cycle(seconds)

    def stopwatch(call):
        taken = next(clock)
        return lambda: Timing(taken)

    target = replace(cpu_target.target(), peers=peers, stopwatch=stopwatch, **changes)
    with torch.no_grad():
        return speed.speed_of(CPU, {"cpu": lambda: target})


def test_a_gain():
    found = measure(1.0, 0.8, 0.2)
    assert found.level == "ok" and found.value.startswith("smooth field, [1, ")
    assert re.search(r"At 256 tokens: 4[.0]* times as fast as the fastest dense peer \(dense bf16\)", found.value)


def test_no_gain_says_what_to_do(monkeypatch):
    found = measure(1.0, 0.8, 1.6)
    assert found.level == "note" and "No gain at 256 tokens: 0.5" in found.value
    assert found.advice == "python -m sparge_compile bench"
    monkeypatch.setattr(speed, "busy", lambda: "The machine is busy.")
    assert "busy" in measure(1.0, 0.8, 1.6).advice


def test_wrong_numbers_are_a_problem_and_no_time(monkeypatch):
    monkeypatch.setattr(speed, "MAX_ERROR", 1e-9)
    found = measure(1.0, 0.8, 0.2)
    assert found.level == "problem" and "Accuracy gate failed" in found.value and "times as fast" not in found.value


def test_the_peers_are_the_devices_own_dense_ones():
    """A GPU's are not those of a CPU; flex would be compiled for seconds, sage is not installed everywhere."""
    peers = {"dense mine": CPU_PEERS["dense fp32"], "dense absent": replace(CPU_PEERS["dense fp32"], prepare=absent)}
    peers |= {OURS: CPU_PEERS[OURS], "flex": replace(CPU_PEERS["flex"], prepare=absent)}
    found = measure(1.0, 0.5, peers=peers)
    assert found.level == "ok" and "times as fast as the fastest dense peer (dense mine)" in found.value
    assert "flex" not in speed.quick(replace(cpu_target.target(), peers=peers)).peers


def absent(problem):
    raise ModuleNotFoundError("No module named 'sageattention'")
