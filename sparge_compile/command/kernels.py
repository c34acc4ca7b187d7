"""The doctor on kernels: which one each device gets and why, and from what length on it is used."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparge_compile.command.findings import REPORT, Finding, from_reason, note
from sparge_compile.rules import break_even
from sparge_kernels import cpu, ops

CPU = torch.device("cpu")


def devices() -> list[torch.device]:
    """The CPU, and all GPUs."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [CPU, *(torch.device("cuda", index) for index in range(count))]


def reason_against(device: torch.device) -> str | None:
    """Why the kernel chosen for a device cannot run; None if it can."""
    try:
        return ops.unavailable(device)
    except ValueError as error:  # SPARGE_CPU_KERNEL names no kernel
        return str(error)


def look() -> Iterator[Finding]:
    for device in devices():
        reason = reason_against(device)
        if reason is None:
            yield Finding(str(device), _kernel(device))
        else:
            do = (
                f"unset {cpu.KERNEL_VARIABLE}"
                if cpu.KERNEL_VARIABLE in reason
                else f"mend what it names; else {REPORT}"
            )
            yield from_reason(str(device), f"no kernel, attention stays dense: {reason}", otherwise=do)
        yield from minimum(device)


def _kernel(device: torch.device) -> str:
    if device.type == "cuda":
        return "Triton kernels, the only ones for GPUs"
    chosen = cpu.chosen_kernel()
    if chosen != "native":
        return f"{chosen}, because {cpu.KERNEL_VARIABLE} says so"
    products = ops.int8_products(device)
    return f"native, the default ({f'INT8 products by {products}' if products else 'no fast INT8 products'})"


def minimum(device: torch.device) -> Iterator[Finding]:
    """The default `min_tokens`, and where it comes from."""
    tokens = break_even(device, "int8")
    if device.type == "cuda":
        why = "an assumption: no GPU was measured yet"
    elif (products := ops.int8_products(device)) is not None:
        exact = break_even(device, "none")
        why = f"the measured break-even of CPUs with {products}; {exact} with precision='none'"
    else:
        why = "without fast INT8 products it takes skipped tiles to gain, and shorter calls skip too few"
    yield Finding("min_tokens", f"{tokens} on {device}: {why}")
    for dtype in (torch.float32, torch.bfloat16):
        if (reason := ops.unmeasured(device, dtype, "int8")) is not None:
            do = "measure it with python -m sparge_compile bench, then set Policy(min_tokens=...)"
            yield note("min_tokens", f"{str(dtype).removeprefix('torch.')} calls stay dense by default: {reason}", do)
