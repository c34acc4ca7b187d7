"""The doctor on software: versions, the backend's registration, environment variables that change things."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

import sparge_compile
from sparge_compile.command.findings import Finding, note, problem
from sparge_kernels import cpu

OLDEST, NEWEST = (2, 11), (2, 15)
GROUP, BACKEND, TARGET = "torch_dynamo_backends", "sparge", "sparge_compile.backend:sparge"
SWITCHES_OFF = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
SHOWN = (
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_NUM_THREADS",
    "CXX", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ATEN_CPU_CAPABILITY", "LD_PRELOAD",
    "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME",
)  # fmt: skip


def versions() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield torch_version(torch.__version__)
    yield triton_version()
    yield own_version()
    yield from registration()


def torch_version(version: str) -> Finding:
    """Is this torch one of the supported ones?"""
    oldest, newest = (".".join(map(str, limit)) for limit in (OLDEST, NEWEST))
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if found < OLDEST:
        return problem("torch", f"{version} is too old", f"pip install 'torch>={oldest}'")
    if found > NEWEST:
        return note("torch", f"{version} is newer than any tested", f"if something fails, install torch {newest}")
    return Finding("torch", f"{version} (supported: {oldest} to {newest})")


def triton_version() -> Finding:
    """Triton, which only GPUs need."""
    try:
        return Finding("Triton", str(importlib.import_module("triton").__version__))
    except Exception as error:  # an installation may be broken in any way
        why = f"cannot be imported ({type(error).__name__}: {str(error)[:120]})"
        if torch.cuda.is_available():
            return problem(
                "Triton", f"{why}; the GPU kernels need it", "install the triton that your torch build names"
            )
        return Finding("Triton", f"{why}; only GPUs need it")


def own_version() -> Finding:
    folder, own = Path(sparge_compile.__file__).parent, sparge_compile.__version__
    try:
        installed = importlib.metadata.version("sparge-compile")
    except importlib.metadata.PackageNotFoundError:
        return problem("sparge-compile", f"{own} in {folder} is not installed", f"pip install -e {folder.parent}")
    if installed != own:
        text = f"{own} in {folder}, but {installed} is installed"
        return problem("sparge-compile", text, "remove one of the two: pip uninstall sparge-compile, or PYTHONPATH")
    return Finding("sparge-compile", f"{own} in {folder}")


def registration() -> Iterator[Finding]:
    """Does torch.compile(backend="sparge") find this backend?"""
    name, again = "backend", "install the package again: pip install --force-reinstall --no-deps sparge-compile"
    entries = {entry.value for entry in importlib.metadata.entry_points(group=GROUP, name=BACKEND)}
    if entries != {TARGET}:
        found = f"the entry point is {' and '.join(sorted(entries))}" if entries else "there is no entry point"
        yield problem(name, f"{found}, so torch.compile(backend='sparge') does not find this package", again)
    elif BACKEND not in torch.compiler.list_backends(exclude_tags=()):
        yield problem(name, "torch.compiler.list_backends() does not know 'sparge'", again)
    else:
        yield Finding(name, "'sparge' is registered with torch.compile")


def environment() -> Iterator[Finding]:
    """Variables that are set and change what happens."""
    variable = cpu.KERNEL_VARIABLE
    if os.environ.get(variable):
        try:
            yield _cpu_kernel(variable, cpu.chosen_kernel())
        except ValueError as error:
            yield problem(variable, str(error).rstrip("."), f"unset {variable}, or set it to one of these")
    for name in SWITCHES_OFF:
        if os.environ.get(name) == "1":
            yield problem(name, "1: torch.compile does nothing, models run as they are", f"unset {name}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        words = "1: Triton's kernels run in its interpreter, thousands of times slower"
        on_gpu = torch.cuda.is_available()
        yield Finding("TRITON_INTERPRET", words, "problem" if on_gpu else "note", "unset it, unless for tests")
    if os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES") == "1":
        yield note("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1: every process compiles everything anew", "unset it")
    for name in SHOWN:
        if name in os.environ:
            yield Finding(name, os.environ[name] or "(empty)")


def _cpu_kernel(variable: str, kernel: str) -> Finding:
    if kernel == "native":
        return Finding(variable, kernel)
    what = {
        "blocked": "a kernel in plain torch, much slower than the native one, which takes no masks",
        "interpreted": "the GPU kernels in Triton's interpreter, for tests: slower than anything",
    }
    return note(variable, f"{kernel}: {what.get(kernel, 'not the default kernel')}", f"unset {variable} for speed")
