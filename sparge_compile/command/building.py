"""The doctor on building: the C++ compiler, the native kernel, and the folders where compiled code is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from sparge_compile import dynamo
from sparge_compile.command.findings import Finding, Level, from_reason, problem
from sparge_kernels import cpu
from sparge_kernels.cpu import build, native

LEAST_SPACE = 256 * 2**20
SMALL_LIBRARY = """
#include <cmath>
extern "C" float roots(const float* x, int n) {
    float total = 0;
    #pragma omp parallel for reduction(+ : total)
    for (int i = 0; i < n; i++) total += std::sqrt(x[i]);
    return total;
}
"""


def native_is_needed() -> bool:
    """The CPU's calls run the native kernel, or would but for a wrong name."""
    try:
        return cpu.chosen_kernel() == "native"
    except ValueError:
        return True


def look() -> Iterator[Finding]:
    yield compiler()
    yield native_kernel()
    yield from folders()


def compiler() -> Finding:
    """The C++ compiler, which Inductor needs on a CPU too: does it make a library with OpenMP?"""
    try:
        command = build.compiler_command()
    except build.Unavailable as error:
        return from_reason("C++ compiler", str(error))
    path = shutil.which(command[0]) or command[0]
    if (failure := compile_failure(command)) is not None:
        return problem("C++ compiler", f"{path} {failure}", "set CXX to another one, or install g++")
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20, check=True)
        if answer.stdout.strip():
            return Finding("C++ compiler", f"{path}: {answer.stdout.strip().splitlines()[0]}")
    return Finding("C++ compiler", path)


def compile_failure(command: Sequence[str]) -> str | None:
    """Why the compiler cannot make a small library, in words that follow its name; None if it can."""
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            source, library = Path(folder, "small.cpp"), Path(folder, "small.so")
            source.write_text(SMALL_LIBRARY)
            arguments = [str(source), "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-o", str(library)]
            env = {**os.environ, "LC_ALL": "C"}
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, env=env)
            is_made = library.exists()
    except (OSError, subprocess.SubprocessError) as error:
        return f"cannot be tried ({' '.join(str(error).split())[:200]})"
    if done.returncode:
        said = " ".join(done.stderr.split())[:200] or "no output"
        return f"does not compile with OpenMP (exit status {done.returncode}: {said})"
    return None if is_made else "compiles nothing: it is no C++ compiler"


def native_kernel() -> Finding:
    """The native CPU kernel, built now if it is not there."""
    level: Level = "problem" if native_is_needed() else "note"
    path = build.library_path()
    was_there, start = build.is_there(path), time.monotonic()
    if was_there and (death := death_of_loading(path)) is not None:
        # Nothing after this may load it here, either.
        build.give_up(f"{path} kills the process that loads it ({death}). Build it anew: {build.AHEAD_OF_TIME} --force")
    try:
        native.library()
    except build.Unavailable as error:
        return from_reason("native CPU kernel", str(error), level)
    if not was_there:
        return Finding("native CPU kernel", f"built now in {time.monotonic() - start:.1f} s: {path}")
    built = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    return Finding("native CPU kernel", f"built {built}: {path}")


LOAD = """
import contextlib, ctypes, sys
with contextlib.suppress(ImportError):  # Windows has none
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
ctypes.CDLL(sys.argv[1])
"""


def death_of_loading(library: Path) -> str | None:
    """The signal that ends another process that loads the library, in words; None if it lives."""
    try:
        done = subprocess.run([sys.executable, "-I", "-c", LOAD, str(library)], capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):  # nothing is known of it
        return None
    number = -done.returncode
    return signal.strsignal(number) or f"signal {number}" if number > 0 else None


def folders() -> Iterator[Finding]:
    """Where compiled code is kept: can it be written there, and is there room?"""
    library = build.library_path()
    # What is built already can be used from a folder that cannot be written.
    level: Level = "note" if os.access(library, os.R_OK) or not native_is_needed() else "problem"
    yield folder("torch's extensions", library.parents[2], "TORCH_EXTENSIONS_DIR", level)
    try:
        inductor = Path(dynamo.inductor_cache_folder())
    except Exception as error:  # a user without a name or a home
        words = f"unknown ({type(error).__name__}: {str(error)[:120]})"
        yield problem("Inductor's cache", words, "set TORCHINDUCTOR_CACHE_DIR to a folder")
    else:
        yield folder("Inductor's cache", inductor, "TORCHINDUCTOR_CACHE_DIR", "problem")
    if (triton := sys.modules.get("triton")) is not None:
        chosen = Path(str(triton.knobs.cache.dir))
        yield folder("Triton's cache", chosen, "TRITON_CACHE_DIR", "problem" if torch.cuda.is_available() else "note")


def folder(name: str, path: Path, variable: str, level: Level) -> Finding:
    """Whether a file can be written there, or where the folder would be made, and how much room there is."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    do = f"set {variable} to a folder that can be written"
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is no folder")
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"sparge")
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding(name, f"{path} cannot be written ({error.strerror or error})", level, do)
    if free < LEAST_SPACE:
        text = f"{path} has only {free / 2**20:.0f} MiB of free space"
        return Finding(name, text, level, f"make room there, or {do}")
    if not path.exists():
        return Finding(name, f"{path} (will be made), {free / 2**30:.1f} GiB free")
    return Finding(name, f"{path}, {free / 2**30:.1f} GiB free")
