"""The doctor's self-test: every kernel there is against dense attention in fp64, called directly and compiled."""

from __future__ import annotations

import os
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.command.findings import REPORT, Finding, from_reason, problem
from sparge_compile.command.kernels import CPU, devices, reason_against
from sparge_compile.command.self_test_cases import CASES, COMPILED, Answer, Call, Case, answer, by_reference, fault
from sparge_compile.command.self_test_cases import relative_l1 as error_of
from sparge_compile.command.software import SWITCHES_OFF
from sparge_compile.report import last_report
from sparge_kernels import cpu, ops
from sparge_kernels.thresholds import NEVER_SKIP, pack

Kernel = Callable[[Case, Call], Answer]
COMPILE = "torch.compile"


def look() -> Iterator[Finding]:
    with torch.no_grad():
        yield check("reference", by_reference, CPU, cases_of("reference"))
        for name in tested_kernels():
            with cpu_kernel(name):
                reason = cpu.unavailable(has_mask=False)
                if reason is not None:
                    yield from_reason(f"{name} on cpu", f"not tested: {reason}", "note")  # a problem of the compiler's
                    continue
                yield check(name, by_operator, CPU, cases_of(name))
        for device in devices():
            if reason_against(device) is not None:
                continue  # the section on kernels says so
            if device.type != "cpu":
                yield check("Triton", by_operator, device, CASES)
            yield check(COMPILE, by_compile, device, COMPILED)


def tested_kernels() -> list[str]:
    """Of the CPU; the interpreter, which is slow, only where it is chosen."""
    chosen = os.environ.get(cpu.KERNEL_VARIABLE) == "interpreted"
    return [name for name in cpu.KERNELS if name != "interpreted" or chosen]


def cases_of(kernel: str) -> list[Case]:
    """Those that a kernel can run, in bearable time, and that say something of it."""
    if kernel == "reference":  # it is the answer to the others
        return [case for case in CASES if not case.is_default]
    if kernel == "blocked":
        return [case for case in CASES if case.mask is None]
    if kernel == "interpreted":  # seconds a case, and more for each head
        return [case for case in CASES if not case.is_default and case.batch == 1]
    return list(CASES)


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


def by_operator(case: Case, call: Call) -> Answer:
    """The kernel that the operator chooses. RuntimeError if it runs dense."""
    thresholds = pack([case.choice.thresholds])
    with ops.record_stats() as records, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs dense is an error here
        output = torch.ops.sparge.attention.default(
            call.q, call.k, call.v, call.mask, thresholds=thresholds, **case.sparse_options
        )
    return Answer(output, density_of(records))


def by_compile(case: Case, call: Call) -> Answer:
    """torch.compile(backend="sparge"). RuntimeError if the call is not rewritten, or runs dense all the same."""
    before = last_report()
    with ops.record_stats() as records:
        output = compile_anew(case)(call.q, call.k, call.v, call.mask)
    after = last_report()
    if after is before or not after.sites:
        raise StayedDenseError("the backend was never called")
    if (reason := after.sites[-1].reason) is not None:
        raise StayedDenseError(reason)
    return Answer(output, density_of(records))


class StayedDenseError(RuntimeError):
    """A compiled call was not rewritten; the message is the reason."""


def density_of(records: Sequence[ops.StatsRecord]) -> float:
    """Of the one call that the records should be of. RuntimeError if it is another number of calls, or it ran dense."""
    if [one.ran for one in records] != ["sparse"]:
        raise RuntimeError(f"one call of the kernel is expected, there were {[one.ran for one in records] or 'none'}")
    return float(records[0].density.mean())


def compile_anew(case: Case) -> Callable[..., Tensor]:
    """Attention over q, k, v and mask that is compiled when it is called, whatever was compiled before."""
    options: dict[str, Any] = {"sparge.min_tokens": 0, "sparge.topk": 1.0, "sparge.pv_threshold": NEVER_SKIP}

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, **case.options)

    # Dynamo keeps what it compiled by code object: of one that it knows, it would not call the backend again.
    fresh = types.FunctionType(attend.__code__.replace(), globals(), "attend", None, attend.__closure__)
    return torch.compile(fresh, backend="sparge", options=options, dynamic=False)


def check(name: str, kernel: Kernel, device: torch.device, cases: Sequence[Case]) -> Finding:
    """One kernel on all its cases."""
    title, start, worst = f"{name} on {device}", time.monotonic(), 0.0
    for case in cases:
        try:
            right = answer(case, device)
            found = kernel(case, case.call(device))
        except Exception as failure:  # whatever a broken kernel or compiler raises
            return problem(title, f"{case.name}: {in_words(failure)}", remedy(name, failure))
        if (wrong := fault(case, found, right)) is not None:
            return problem(title, f"{case.name}: {wrong}", remedy(name))
        worst = max(worst, error_of(found, right) / case.bound)
    seconds = time.monotonic() - start
    return Finding(title, f"right in {len(cases)} cases, at most {worst:.0%} of the allowed error, {seconds:.1f} s")


def in_words(failure: Exception) -> str:
    words = " ".join(str(failure).split())[:200]
    if isinstance(failure, StayedDenseError):
        return f"attention stayed dense: {words}"
    return f"{type(failure).__name__}: {words}"


def remedy(name: str, failure: Exception | None = None) -> str:
    """What to do about a kernel, or torch.compile, that is wrong, or that failed."""
    if isinstance(failure, StayedDenseError):
        return f"unset {' and '.join(SWITCHES_OFF)}, or mend what it names; else {REPORT}"
    if name == COMPILE:
        return f"do not use this backend here; {REPORT}" if failure is None else f"mend what it names; else {REPORT}"
    if name == "native":
        return (
            "build it again with python -m sparge_kernels.cpu.build --force, or with another compiler (CXX); "
            f"until it is right, do not use this backend here; {REPORT}"
        )
    return f"do not use this kernel here; {REPORT}"
