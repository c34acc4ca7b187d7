"""Compiles what a call of the Triton kernels would launch, for a GPU that is not here.

The call is made on `meta` tensors; each launch goes to the kernel's own `warmup`, which derives types, constants and
alignments from the arguments as a launch does, and compiles for the target that Triton's active driver names.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sparge_kernels.triton import launch

KILOBYTE = 1024


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. shared_limit: bytes of shared memory (LDS) one program may have."""

    name: str  # as launch.architecture gives it
    gpu: GPUTarget
    shared_limit: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm80", GPUTarget("cuda", 80, 32), 163 * KILOBYTE),
        Target("sm86", GPUTarget("cuda", 86, 32), 99 * KILOBYTE),
        Target("sm89", GPUTarget("cuda", 89, 32), 99 * KILOBYTE),
        Target("sm90", GPUTarget("cuda", 90, 32), 227 * KILOBYTE),
        Target("sm100", GPUTarget("cuda", 100, 32), 227 * KILOBYTE),
        Target("sm120", GPUTarget("cuda", 120, 32), 99 * KILOBYTE),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KILOBYTE),
    )
}


@dataclass(frozen=True)
class Compiled:
    """A kernel as a target would run it; `error` alone counts where the compiler gave up."""

    kernel: str
    target: str
    key: str = ""  # Triton's hash of source, types, constants, alignments, options and target
    warps: int = 0
    stages: int = 0
    registers: int = 0  # of a thread; on AMD vector and accumulation registers together
    spills: int = 0  # bytes of a thread's stack and local memory (scratch)
    shared: int = 0  # bytes
    instructions: tuple[tuple[str, int], ...] = ()  # of matrices and asynchronous copies: ("wgmma s8", 4), ...
    scalar_products: int = 0  # tl.dot that no matrix instruction computes
    error: str | None = None


class _Driver:
    """Of Triton's driver what compiling asks for; there is no GPU behind it."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target.gpu

    def get_current_device(self) -> str:
        return self._target.name  # kernels keep what they compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: Target) -> Iterator[list[Compiled]]:
    """Inside, launches through launch.run compile for `target` and fill the list, equal ones once."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET before Triton is imported")
    compiled: list[Compiled] = []
    met: set[str] = set()
    launch_kernel = launch.run

    def compile_instead(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        name = kernel.fn.__name__
        try:
            result = _compile(kernel, lambda stand_in: launch_kernel(stand_in, grid, *args, **meta))
        except Exception as error:  # of whatever kind Triton, LLVM and ptxas raise
            compiled.append(Compiled(name, target.name, error=f"{type(error).__name__}: {str(error)[-400:]}"))
            return
        if result.hash not in met:
            met.add(result.hash)
            compiled.append(describe(result, name, target))

    with (
        tempfile.TemporaryDirectory() as folder,  # nothing of an earlier run may pass for this one's
        mock.patch.object(launch, "run", compile_instead),
        mock.patch.object(launch, "architecture", lambda device: target.name),
        mock.patch.object(triton.knobs.cache, "dir", folder),
    ):
        driver.set_active(_Driver(target))
        try:
            yield compiled
        finally:
            driver.set_active(None)  # the default one, when next asked for: asking now fails without a GPU


def _compile(kernel: Any, start: Callable[[Any], None]) -> Any:
    """The compiled kernel that `start(kernel)` would launch."""
    results = []

    class StandIn:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **meta: results.append(kernel.warmup(*args, grid=grid, **meta))

    start(StandIn())
    return results[0]


def describe(result: Any, kernel: str, target: Target) -> Compiled:
    """Resources and instructions of one of Triton's compiled kernels."""
    if target.gpu.backend == "hip":
        assembly = result.asm["amdgcn"]
        registers = _number(assembly, "vgpr_count")
        # Spilled scalar registers go to lanes of vector registers; what goes to memory is in the private segment.
        spills = _number(assembly, "private_segment_fixed_size")
    else:
        assembly = result.asm["ptx"]
        registers, spills = _nvidia_resources(result.asm["cubin"])
    metadata = result.metadata
    return Compiled(
        kernel, target.name, result.hash, metadata.num_warps, metadata.num_stages, registers, spills, metadata.shared,
        tuple(sorted(_instructions(assembly).items())), _scalar_products(result.asm["ttgir"]),
    )  # fmt: skip


def _number(assembly: str, name: str) -> int:
    found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
    if found is None:
        raise ValueError(f"the assembly does not state .{name}")
    return int(found[1])


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory of a thread, as the cubin states them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump states no resources: {usage}")
    return int(found[1]), int(found[2]) + int(found[3])


_PATTERNS = (
    # What the name keeps: the unit and the type of the operands.
    (r"\b(mma)\.sync\.aligned\.m\d+n\d+k\d+\.row\.col(?:\.satfinite)?\.\w+\.(\w+)", "{0} {1}"),
    (r"\b(wgmma)\.mma_async\.sync\.aligned\.m\d+n\d+k\d+\.\w+\.(\w+)", "{0} {1}"),
    (r"\b(tcgen05)\.mma\.cta_group::\d\.kind::(\w+)", "{0} {1}"),
    (r"\bv_(s?mfma)_[fi]32_\d+x\d+x\d+(?:_\d+b)?_?([a-z]+\d+)", "{0} {1}"),
    (r"\b(cp\.async)\.c[ag]\.", "{0}"),
    (r"\b(cp\.async\.bulk)\.", "{0}"),
)


def _instructions(assembly: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for pattern, name in _PATTERNS:
        counts.update(name.format(*found.groups()) for found in re.finditer(pattern, assembly))
    return counts


def _scalar_products(ttgir: str) -> int:
    """How many products of tiles are left to multiply-add instructions: their layout is no matrix unit's."""
    return len(re.findall(r"\btt\.dot\b[^\n]*-> tensor<[^>]*, #blocked\d*>", ttgir))
