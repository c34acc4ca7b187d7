"""Builds the native CPU kernel at first use with one compiler command, and loads it with ctypes.

The C++ sources of this folder need neither torch's nor Python's headers. The library lies in

    <root>/sparge_kernels/<key>/sparge_cpu.so

Root is torch's own for extensions: TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions. The key covers the sources,
the flags and this CPU's features: the code is for one CPU, and home folders are shared between machines. It does not
cover the compiler: after a change of compiler, build with --force. And it takes none to compute, so a container loads
what was built ahead of time: `python -m sparge_kernels.cpu.build`.

Not `torch.utils.cpp_extension.load`: it needs the program ninja, which torch does not require (setuptools, which it
imports, torch 2.11 to 2.15 do). Its lock is a file that exists: a build that fails removes it, a build that is killed
does not, and every later load waits for it to go, without end. And its folder is named after the extension, Python and
accelerator, not after the CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

# Before the library, for its OpenMP: the library asks for "libgomp.so.1", and the linker answers with the one that
# torch's wheels bring under that name, already loaded. One runtime, and one pool of threads, for both.
import torch  # noqa: F401 - for what it loads

from sparge_kernels.cpu import elf

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # of a module, which mypy has a type for

Accept = Callable[[ctypes.CDLL], str | None]  # None, or a reason in words against the library

SOURCES = Path(__file__).parent
CPU_INFO = Path("/proc/cpuinfo")
COMPILERS = ("g++", "clang++", "c++")
# Not -ffast-math: NaN and infinity keep their meaning. The two -fno- flags only drop errno and floating-point traps.
# GCC's own header of AVX-512 intrinsics trips -Wuninitialized.
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
TIMEOUT_SECONDS = 300.0
AHEAD_OF_TIME = "python -m sparge_kernels.cpu.build"

_lock = threading.Lock()
_results: dict[tuple[str | None, tuple[str, ...]], ctypes.CDLL | str] = {}  # a str: why there is none


class Unavailable(RuntimeError):
    """There is no native library; the message is the reason in words, and what to do about it."""


def load(
    arch: str | None = None,
    *,
    extra: Sequence[str] = (),
    accept: Accept | None = None,
    needs: Sequence[str] = (),
    force: bool = False,
) -> ctypes.CDLL:
    """The library, built if it is not there yet. A process asks once for each `arch` and `extra`, failures included.

    arch: the compiler flag that names the CPU; None is the one this runs on.
    extra: further compiler flags.
    accept: called on a library just built, before any other process sees it.
    needs: functions the library must have.
    force: build even if the library is there, or failed before.
    """
    request = (arch, tuple(extra))
    with _lock:
        if force or request not in _results:
            try:
                found = _load_or_build(library_path(arch, extra=extra), _flags(arch, extra), accept, force)
                if missing := [name for name in needs if not hasattr(found, name)]:
                    raise Unavailable(f"the library has no {missing[0]}. Build it anew: {AHEAD_OF_TIME} --force")
                _results[request] = found
            except Unavailable as error:
                _results[request] = str(error)
        result = _results[request]
    if isinstance(result, str):
        raise Unavailable(result)
    return result


def library_path(arch: str | None = None, *, extra: Sequence[str] = ()) -> Path:
    """Where the library lies, or will once it is built."""
    key = hashlib.sha256(repr((_flags(arch, extra), platform.machine(), cpu_features())).encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        content = path.read_bytes()
        key.update(f"{path.name} {len(content)} ".encode() + content)
    return _root() / "sparge_kernels" / key.hexdigest()[:16] / "sparge_cpu.so"


def is_there(library: Path) -> bool:
    """It can be read, and the file is whole: to load one that is cut off would kill the process."""
    try:
        return not elf.is_cut_off(library)
    except OSError:
        return False


def give_up(reason: str) -> None:
    """From now on `load` of the library for this CPU fails in this process, with this reason."""
    with _lock:
        _results[None, ()] = reason


def _root() -> Path:
    """What torch uses: TORCH_EXTENSIONS_DIR, else `torch.utils.cpp_extension.get_default_build_root()`."""
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen).absolute()
    cache = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(cache), "torch_extensions").resolve()  # noqa: PTH111 - Path's fails without a home


def _flags(arch: str | None, extra: Sequence[str]) -> tuple[str, ...]:
    if platform.machine().lower() in ("aarch64", "arm64"):
        return (*FLAGS, arch or "-mcpu=native", *extra)
    # Tuned for Zen, GCC 12 reads an operand again for every multiplication: fp32 products took 1.2 times as long.
    return (*FLAGS, arch or "-march=native", "-mtune=generic", *extra)


def cpu_features() -> str:
    """This CPU's feature flags in the words of its system, in order."""
    with suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, Arm
                return " ".join(sorted(value.split()))
    return platform.processor()


def _load_or_build(library: Path, flags: Sequence[str], accept: Accept | None, force: bool) -> ctypes.CDLL:
    if not force and is_there(library):
        return _open(library)
    compiler = compiler_command()
    with _locked(library.parent):
        if not force and is_there(library):  # built by another process meanwhile
            return _open(library)
        if not force and os.access(library, os.F_OK):
            _say(f"sparge: {library} is cut off or cannot be read: it is built anew\n")
        with _progress(compiler[0]):
            return _build(library, compiler, flags, accept)


def _build(library: Path, compiler: Sequence[str], flags: Sequence[str], accept: Accept | None) -> ctypes.CDLL:
    """Compiles, tries and publishes the library; the caller holds the folder's lock."""
    folder = library.parent
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    if not sources:
        raise Unavailable(f"there are no C++ sources in {SOURCES}. Install the package again.")
    # A new name each time: the loader gives an old library again for a name it knows. Not a file of `tempfile`: those
    # are for one user alone, and a container's image is built by one user and run by another.
    fresh = folder / f"building-{secrets.token_hex(8)}.so"
    try:
        with _writing_to(folder):
            for left_by_a_killed_build in folder.glob("building-*"):
                left_by_a_killed_build.unlink(missing_ok=True)
        _compile([*compiler, *sources, *flags, "-o", str(fresh)], folder)
        opened = _open(fresh)
        if accept and (reason := accept(opened)):
            raise Unavailable(
                f"the library just built fails its check: {reason}. Set CXX to another compiler, or report it."
            )
        with _writing_to(folder):
            with fresh.open("rb") as written:  # a crash of the machine must not leave half a library under its name
                os.fsync(written.fileno())
            fresh.replace(library)
    finally:
        fresh.unlink(missing_ok=True)
    return opened


def compiler_command() -> list[str]:
    """The compiler's command: $CXX, which may have arguments, else the first installed one. Raises `Unavailable`."""
    chosen = os.environ.get("CXX", "")
    if not chosen.strip():
        for name in COMPILERS:
            if shutil.which(name):
                return [name]
        raise Unavailable(
            f"there is no C++ compiler: none of {', '.join(COMPILERS)} is on PATH, and CXX is not set. "
            "Install one (on Debian and Ubuntu: apt-get install g++) or set CXX to one."
        )
    with suppress(ValueError):  # a quote that is never closed
        command = shlex.split(chosen)
        if shutil.which(command[0]):
            return command
    raise Unavailable(f"CXX is set to {chosen!r}, which is no program here. Set it to a C++ compiler, or unset it.")


def _compile(command: Sequence[str], folder: Path) -> None:
    """Runs the compiler; its output goes to build.log."""
    log = folder / "build.log"
    with _writing_to(folder):
        log.write_text(shlex.join(command) + "\n")
        output = log.open("ab")
    with output:
        status = _run(command, output)
    if status:
        said = log.read_text(errors="replace").partition("\n")[2]
        error = re.search(r".*(error: |cannot find|undefined reference).*", said)  # the compiler's words, the linker's
        said = (error[0] if error else said[-200:]).strip() or "no output"
        raise Unavailable(
            f"{command[0]} failed with exit status {status}: {said}. "
            f"All it said is in {log}. Mend what it names, or set CXX to another compiler."
        )


def _run(command: Sequence[str], output: IO[bytes]) -> int:
    # LC_ALL: the word to look for is "error". A session of its own: a compiler has children, and all of them must go.
    env = {**os.environ, "LC_ALL": "C"}
    try:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=env)
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run ({error.strerror}). Set CXX to another compiler.") from error
    try:
        return process.wait(TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        reason = f"{command[0]} had not finished after {TIMEOUT_SECONDS:g} s and was stopped"
        raise Unavailable(f"{reason}. Build when the machine is less busy: {AHEAD_OF_TIME}") from error
    finally:
        if process.returncode is None:  # too late, or interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(f"the library cannot be loaded ({error}). Build it anew: {AHEAD_OF_TIME} --force") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system releases if this process dies."""
    if fcntl is None:
        raise Unavailable("building needs file locks (fcntl), which Windows has not. Use Linux, WSL or macOS.")
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    with lock:
        with _writing_to(folder):
            _wait_for_lock(lock)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing would not do: a child forked meanwhile has it open too


def _wait_for_lock(lock: IO[str]) -> None:
    start, told = time.monotonic(), False
    while time.monotonic() - start < TIMEOUT_SECONDS:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                _say("sparge: another process is building the CPU kernel; waiting for it\n")
            told = True
            time.sleep(0.05)
    reason = f"another process still builds it after {TIMEOUT_SECONDS:g} s: the one that holds {lock.name}"
    raise Unavailable(f"{reason}. End that process, then build ahead of time: {AHEAD_OF_TIME}")


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{folder} cannot be written or locked ({error.strerror})"
        raise Unavailable(f"{reason}. Set TORCH_EXTENSIONS_DIR to another folder.") from error


@contextmanager
def _progress(compiler: str) -> Iterator[None]:
    start, end = time.monotonic(), "failed after"
    _say(f"sparge: building the CPU kernel with {compiler} (once per machine; about 5 s) ... ")
    try:
        yield
        end = "done in"
    finally:
        _say(f"{end} {time.monotonic() - start:.1f} s\n")


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # a broken or closed stderr is no reason to fail
        print(text, end="", file=sys.stderr, flush=True)


def _forget_lock() -> None:
    """A forked child may have taken over a lock that nobody will release."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds ahead of time and prints the library's path; 1 and the reason if there is none."""
    parser = argparse.ArgumentParser(prog=AHEAD_OF_TIME, description="Build the native CPU kernel ahead of time.")
    parser.add_argument("--force", action="store_true", help="build it even if it is there")
    options = parser.parse_args(arguments)
    from sparge_kernels.cpu.native import self_check

    try:
        load(accept=self_check, force=options.force)
        print(library_path())
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
