"""The doctor's self-test: every kernel there is against dense attention in fp64, called directly and compiled."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.bench.accuracy import relative_l1
from sparge_compile.bench.machine import busy
from sparge_compile.bench.peers import CPU_PEERS, OURS, sparge_density
from sparge_compile.bench.problem import Problem, of_policy, smooth_problem
from sparge_compile.bench.timing import event_stopwatches, rounds, wall_clock
from sparge_compile.command.findings import REPORT, Finding, from_reason, note, problem
from sparge_compile.command.kernels import CPU, devices, reason_against
from sparge_compile.command.software import SWITCHES_OFF
from sparge_compile.policy import Policy
from sparge_compile.report import Report, last_report
from sparge_kernels import cpu, ops, reference
from sparge_kernels.thresholds import NEVER_SKIP, Thresholds, pack

SPEED_TOKENS, MAX_ERROR = 8192, 0.05


@dataclass(frozen=True)
class Case:
    """One call of 2 heads and 300 tokens of random numbers, all of whose tiles are computed.

    planted: instead 256 tokens, each query tile of which sees two key tiles and no other; two of four are computed.
    bound: the largest relative L1 to dense attention in fp64 that is right.
    """

    name: str
    bound: float
    dtype: torch.dtype = torch.float32
    precision: str = "int8"
    is_causal: bool = False
    masked: bool = False
    kv_heads: int = 2
    planted: bool = False

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        generator, tokens = torch.Generator().manual_seed(0), 256 if self.planted else 300
        shapes = ((1, 2, tokens, 40), *((1, self.kv_heads, tokens, 40),) * 2)
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        if self.planted:
            kinds = torch.eye(40)[:2].repeat_interleave(128, dim=0)  # [256, 40]: one direction for each query tile
            q, k = (14 * kinds + x / 10 for x in (q, k))  # scores of 31 and 0
        mask = (torch.rand(1, 1, tokens, tokens, generator=generator) < 0.5).to(device) if self.masked else None
        q, k, v = (x.to(device, self.dtype) for x in (q, k, v))
        return q, k, v, mask

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(topk=0.5 if self.planted else 1.0, cdf=1.0, similarity=-1.0, pv=NEVER_SKIP)

    @property
    def options(self) -> dict[str, Any]:
        return {"is_causal": self.is_causal, "enable_gqa": self.kv_heads == 1, "precision": self.precision}


CASES = (
    Case("plain", 2e-2),
    Case("unquantized", 1e-4, precision="none"),
    Case("causal", 2e-2, is_causal=True),
    Case("mask", 2e-2, masked=True),
    Case("grouped heads", 2e-2, kv_heads=1),
    Case("bf16", 2e-2, dtype=torch.bfloat16, is_causal=True),
    Case("half of the tiles", 2e-2, planted=True),
)
COMPILED = Case("compiled", 2e-2, is_causal=True)

Kernel = Callable[[Case, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def by_operator(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The kernel that the operator chooses. RuntimeError if it runs dense."""
    with ops.record_stats() as records, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs dense is an error here
        out = torch.ops.sparge.attention.default(q, k, v, mask, thresholds=pack([case.thresholds]), **case.options)
    if [one.ran for one in records] != ["sparse"]:
        raise RuntimeError(f"the operator ran dense: {reason_against(q.device)}")
    return out


def by_reference(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return reference.attention(q, k, v, thresholds=[case.thresholds], attn_mask=mask, **case.options).output


def error_of(kernel: Kernel, case: Case, device: torch.device) -> float:
    """Relative L1 of a case to dense attention in fp64."""
    q, k, v, mask = case.inputs(device)
    wide = (q.double(), k.double(), v.double(), mask)
    expected = F.scaled_dot_product_attention(*wide, is_causal=case.is_causal, enable_gqa=case.kv_heads == 1)
    output = kernel(case, q, k, v, mask).double()
    return float((output - expected).abs().sum() / expected.abs().sum())


@contextmanager
def cpu_kernel(name: str) -> Iterator[None]:
    """Inside, the operator's CPU kernel is this one."""
    before = os.environ.get(cpu.KERNEL_VARIABLE)
    os.environ[cpu.KERNEL_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[cpu.KERNEL_VARIABLE]
        else:
            os.environ[cpu.KERNEL_VARIABLE] = before


def look() -> Iterator[Finding]:
    with torch.no_grad():
        yield check("reference", by_reference, CPU, CASES)
        for name in tested_kernels():
            with cpu_kernel(name):
                reason = cpu.unavailable(has_mask=False)
                if reason is not None:
                    yield from_reason(f"{name} on cpu", f"not tested: {reason}", "note")  # a problem of the compiler's
                    continue
                yield check(name, by_operator, CPU, [case for case in CASES if not (case.masked and name == "blocked")])
        for device in devices():
            if reason_against(device) is not None:
                continue  # the section on kernels says so
            if device.type != "cpu":
                yield check("Triton", by_operator, device, CASES)
            yield compiled(device)


def tested_kernels() -> list[str]:
    """Of the CPU; the interpreter, which is slow, only where it is chosen."""
    chosen = os.environ.get(cpu.KERNEL_VARIABLE) == "interpreted"
    return [name for name in cpu.KERNELS if name != "interpreted" or chosen]


def check(name: str, kernel: Kernel, device: torch.device, cases: tuple[Case, ...] | list[Case]) -> Finding:
    """One kernel on all its cases."""
    title, start, worst = f"{name} on {device}", time.monotonic(), 0.0
    for case in cases:
        try:
            error = error_of(kernel, case, device)
        except Exception as failure:  # whatever a broken kernel raises
            words = " ".join(str(failure).split())[:200]
            return problem(title, f"{case.name}: {type(failure).__name__}: {words}", remedy(name))
        if not error <= case.bound:
            text = f"{case.name}: WRONG NUMBERS, relative L1 {error:.2g} to dense fp64, allowed is {case.bound:g}"
            return problem(title, text, remedy(name))
        worst = max(worst, error / case.bound)
    seconds = time.monotonic() - start
    return Finding(title, f"right in {len(cases)} cases, at most {worst:.0%} of the allowed error, {seconds:.1f} s")


def remedy(name: str) -> str:
    if name == "native":
        return (
            "build it again with python -m sparge_kernels.cpu.build --force, or with another compiler (CXX); "
            f"until it is right, do not use this backend here; {REPORT}"
        )
    return f"do not use this kernel here; {REPORT}"


def compiled(device: torch.device) -> Finding:
    """One call through torch.compile(backend="sparge")."""
    title, start = f"torch.compile on {device}", time.monotonic()
    policy: dict[str, Any] = {"sparge.min_tokens": 0, "sparge.topk": 1.0, "sparge.pv_threshold": NEVER_SKIP}
    before = last_report()

    def through_compile(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=case.is_causal)

        return torch.compile(attend, backend="sparge", options=policy)(q, k, v)

    try:
        error = error_of(through_compile, COMPILED, device)
    except Exception as failure:  # whatever a compiler raises
        words = " ".join(str(failure).split())[:200]
        return problem(title, f"{type(failure).__name__}: {words}", f"mend what it names; else {REPORT}")
    if (dense := _why_dense(before, last_report())) is not None:
        do = f"unset {' and '.join(SWITCHES_OFF)}, or mend what it names; else {REPORT}"
        return problem(title, f"attention stayed dense: {dense}", do)
    if not error <= COMPILED.bound:
        text = f"WRONG NUMBERS, relative L1 {error:.2g} to dense fp64, allowed is {COMPILED.bound:g}"
        return problem(title, text, f"do not use this backend here; {REPORT}")
    seconds = time.monotonic() - start
    return Finding(title, f"rewritten and right, {error / COMPILED.bound:.0%} of the allowed error, {seconds:.1f} s")


def _why_dense(before: Report, after: Report) -> str | None:
    if after is before or not after.sites:
        return "the backend was never called"
    return after.sites[-1].reason


def speed() -> Iterator[Finding]:
    """One line for each device that has a kernel: a smooth field at the default thresholds, beside dense attention."""
    with torch.no_grad():
        for device in devices():
            if reason_against(device) is not None:
                continue
            if device.type == "cpu" and (slow := cpu.chosen_kernel()) != "native":
                yield Finding(f"speed on {device}", f"not measured: the {slow} kernel is not for speed")
                continue
            yield speed_of(device)


def speed_of(device: torch.device) -> Finding:
    heads, dtype = (2, torch.float32) if device.type == "cpu" else (16, torch.bfloat16)
    field = smooth_problem(SPEED_TOKENS, heads, 64, is_causal=False, precision="int8", dtype=dtype, device=device)
    problem_ = Problem(*field.inputs, False, "int8", of_policy("default", Policy(), False, None))
    dense = ("dense fp32", "dense bf16") if device.type == "cpu" else ("dense bf16",)
    watch = wall_clock if device.type == "cpu" else event_stopwatches(device)
    calls = {name: CPU_PEERS[name].prepare(problem_) for name in (*dense, OURS)}
    error = relative_l1(calls[OURS](), calls[dense[0]]())
    if not error <= MAX_ERROR:
        text = f"not measured: relative L1 {error:.2g} to dense attention, allowed is {MAX_ERROR:g}"
        return problem(f"speed on {device}", text, remedy("default"))
    watches = {name: watch(call) for name, call in calls.items()}
    rounds(watches, 1)
    measured = rounds(watches, 3)
    best = {name: min(times[name].seconds for times in measured) for name in watches}
    fastest = min(dense, key=best.__getitem__)
    ratio = best[fastest] / best[OURS]
    shape = f"{SPEED_TOKENS} tokens, {heads} heads of 64, {str(dtype).removeprefix('torch.')}, default thresholds"
    words = f"{shape} ({sparge_density(problem_):.0%} of the tiles): {ratio:.1f} times as fast as {fastest}"
    if ratio > 1:
        return Finding(f"speed on {device}", words)
    do = "the machine is busy: measure again" if busy() else "measure your shapes: python -m sparge_compile bench"
    return note(f"speed on {device}", f"no gain: {words}", do)
