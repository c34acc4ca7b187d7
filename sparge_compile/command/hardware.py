"""The doctor on hardware: CPU, threads, OpenMP and GPUs."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from sparge_compile.bench import gpu_machine, machine
from sparge_compile.command.findings import Finding, note, problem
from sparge_kernels import cpu
from sparge_kernels.cpu import build

OPENMP = re.compile(r"\S*/(?:lib)?(?:gomp|iomp5|omp)[^/\s]*\.(?:so|dylib)\S*")
MAPS, QUOTA = Path("/proc/self/maps"), Path("/sys/fs/cgroup/cpu.max")


def look() -> Iterator[Finding]:
    yield from processor(build.cpu_features().split())
    yield from threads(torch.get_num_threads(), usable_cpus())
    if (busy := machine.busy()) is not None:
        what, _, do = busy.partition(". ")
        yield note("load", what, do)
    yield from gpus()


def processor(features: list[str]) -> Iterator[Finding]:
    """The CPU and those of its instructions that decide how fast the kernel is."""
    facts = machine.cpu_facts()
    yield Finding("CPU", facts.get("model name") or "unknown model")
    sets = ", ".join(f"{name} {'yes' if name in features else 'no'}" for name in machine.INSTRUCTION_SETS)
    products = cpu.products_of(features)
    if products == "AVX-512 VNNI":
        yield Finding("instruction sets", sets)
    else:
        slow = "without avx512_vnni a call gains mostly by the tiles it skips"
        if products is None:
            slow = "on such CPUs nothing was measured, and a call may gain only by the tiles it skips"
        yield note("instruction sets", f"{sets}: {slow}", "measure your shapes: python -m sparge_compile bench")
    if "amx_tile" in features:
        yield note("AMX", "bf16 and fp16 calls stay dense by default: nothing was measured on such CPUs")


def usable_cpus() -> float:
    """How many CPUs this process may use: by its affinity, and by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        quota, period = QUOTA.read_text().split()
        return min(cpus, int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return cpus


def threads(count: int, cpus: float) -> Iterator[Finding]:
    """Threads against the CPUs there are for them."""
    if count > cpus:
        do = f"set OMP_NUM_THREADS={max(int(cpus), 1)}"
        yield note("threads", f"{count}, but this process may use {cpus:g} CPUs: they wait for each other", do)
    else:
        yield Finding("threads", f"{count} of {cpus:g} CPUs")


def openmp() -> Iterator[Finding]:
    """The OpenMP runtimes that are loaded: two have two pools of threads."""
    try:
        loaded = sorted({match[0] for match in OPENMP.finditer(MAPS.read_text())})
    except OSError:  # not on Linux
        return
    if len(loaded) > 1:
        do = "start without the one that LD_PRELOAD or another package brings"
        yield note("OpenMP", f"{len(loaded)} runtimes are loaded, whose threads compete: {', '.join(loaded)}", do)
    else:
        yield Finding("OpenMP", loaded[0] if loaded else "no runtime is loaded")


def gpus() -> Iterator[Finding]:
    with warnings.catch_warnings(record=True) as said:  # torch warns of a driver that does not fit
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        yield _no_gpu(torch.version.cuda or torch.version.hip, [str(one.message) for one in said])
        return
    for index in range(torch.cuda.device_count()):
        facts = gpu_machine.describe(torch.device("cuda", index))
        wanted = ("GPU", "capability", "memory", "driver", "CUDA")
        words = ", ".join(f"{name} {facts[name]}" for name in wanted[1:] if name in facts)
        yield Finding(f"GPU {index}", f"{facts['GPU']}: {words}")


def _no_gpu(built_for: str | None, said: list[str]) -> Finding:
    tool = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
    if tool is None:
        return Finding("GPU", "none")
    if built_for is None:
        do = "for the GPU, install the torch build that PyTorch's installation page names for it"
        return note("GPU", f"torch {torch.__version__} is built without GPU support ({tool} is here)", do)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return note("GPU", "CUDA_VISIBLE_DEVICES hides all", "unset it to use them")
    why = said[0].splitlines()[0] if said else "torch.cuda.is_available() is False"
    do = f"does `{Path(tool).name}` list a GPU? If so, update its driver, or install a torch build that fits it"
    return problem("GPU", f"torch {torch.__version__} (for {built_for}) cannot use one: {why}", do)
