"""What a measurement must say about the machine it was made on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch

from sparge_kernels import cpu

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def describe(threads: int) -> dict[str, str]:
    """Facts for the head of a table and for JSON, in words."""
    facts = cpu_facts()
    flags = facts.get("flags", facts.get("Features", "")).split()
    has = [f"{name} {'yes' if name in flags else 'no'}" for name in INSTRUCTION_SETS]
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "CPU": facts.get("model name") or platform.processor() or platform.machine(),
        "instruction sets": ", ".join(has),
        "threads": f"{threads} of {os.cpu_count()} CPUs",
        "load average": ", ".join(f"{load:.2f}" for load in loads()) or "unknown",
        "CPU kernel": cpu.chosen_kernel(),
    }


def loads() -> tuple[float, ...]:
    """The load averages of 1, 5 and 15 minutes; none where the system has none (Windows)."""
    return os.getloadavg() if hasattr(os, "getloadavg") else ()


def busy() -> str | None:
    """What to say where other processes keep the CPUs busy; None where they do not."""
    cpus = os.cpu_count() or 1
    load = max(loads()[:1], default=0.0)
    if load < cpus:
        return None
    return (
        f"The machine is busy (load average {load:.1f} on {cpus} CPUs): times are noisy. Measure again when it is not."
    )


def slow_kernel() -> str | None:
    """What to say where the environment chose a CPU kernel that is not the fast one; None where it did not."""
    chosen = cpu.chosen_kernel()
    if chosen == cpu.KERNELS[0]:
        return None
    return (
        f"{cpu.KERNEL_VARIABLE}={chosen} chose a kernel that is right but slow, and that is what was measured: unset "
        f"it to measure the {cpu.KERNELS[0]} one."
    )


def cpu_facts() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    try:
        entry = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in entry.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
