"""The doctor on speed: what the kernel gains here by default, with the peers, clocks and words of `bench`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch

from sparge_compile.bench.machine import busy
from sparge_compile.bench.peers import DENSE, OURS
from sparge_compile.bench.problem import of_policy, smooth_problem
from sparge_compile.bench.rows import Shape
from sparge_compile.bench.target import Target, no_stages
from sparge_compile.bench.targets import TARGETS, Targets
from sparge_compile.bench.verdict import judge, left_dense
from sparge_compile.command.findings import Finding, note, problem
from sparge_compile.command.kernels import devices, reason_against
from sparge_compile.command.self_test import remedy
from sparge_compile.policy import Policy
from sparge_kernels import cpu

TOKENS, ROUNDS, MAX_ERROR = 8192, 3, 0.05


def look() -> Iterator[Finding]:
    """One line for each device that has a kernel."""
    with torch.no_grad():
        for device in devices():
            if reason_against(device) is not None:
                continue
            if device.type == "cpu" and (slow := cpu.chosen_kernel()) != "native":
                yield Finding(f"speed on {device}", f"not measured: the {slow} kernel is not for speed")
                continue
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                yield speed_of(device)


def speed_of(device: torch.device, targets: Targets = TARGETS) -> Finding:
    """A smooth field at the default thresholds, beside dense attention."""
    # What takes seconds to measure: on a CPU work for every thread, and no more.
    heads = max(torch.get_num_threads() // 2, 1) if device.type == "cpu" else 16
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    field = smooth_problem(TOKENS, heads, 64, is_causal=False, precision="int8", dtype=dtype, device=device)
    choice = of_policy("default", Policy(), False, MAX_ERROR)
    shape = Shape(quick(targets[device.type]()), field, field.part(1, 1), ROUNDS, ours_or_none=True)
    found = judge(shape.measure([choice]), choice.name, left_dense(field), only_size=False)
    name = f"speed on {device}"
    words = f"smooth field, [1, {heads}, {TOKENS}, 64], {str(dtype).removeprefix('torch.')}. {found.words}"
    if found.outcome == "gain":
        return Finding(name, words)
    if found.outcome == "gate failed":
        return problem(name, words, remedy("default"))
    return note(name, words, "the machine is busy: measure again" if busy() else "python -m sparge_compile bench")


def quick(target: Target) -> Target:
    """A device's dense peers and this kernel alone, not compared with the reference: the self-test has done that."""
    peers = {
        name: replace(peer, reference_limit=None)
        for name, peer in target.peers.items()
        if name.split()[0] in (DENSE, OURS)
    }
    return replace(target, peers=peers, stages=no_stages, extra_bytes=lambda *_: None)
