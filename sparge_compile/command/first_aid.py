"""What the doctor says where it cannot even start: torch, or what else it imports, is not there or is broken."""

from __future__ import annotations

import importlib.metadata
import json
import platform

from sparge_compile.command.findings import REPORT, Diagnosis, Finding, Section, problem


def tell(error: Exception, as_json: bool) -> int:
    """Prints a diagnosis with one problem, what stopped the doctor; exit status 1. Imports nothing else."""
    words = " ".join(str(error).split())
    what = f"cannot start ({type(error).__name__}: {words})"
    found = [Finding("Python", platform.python_version()), Finding("torch", torch_version())]
    found.append(problem("doctor", what, advice(error, torch_version(), REPORT)))
    if as_json:
        print(json.dumps(Diagnosis((Section("Versions", found),)).to_json(), indent=2))
    else:
        for one in found:
            print(f"{one.name}: {one.value}" + (f" -> {one.advice}" if one.advice else ""))
    return 1


def torch_version() -> str:
    """The installed torch's, by its metadata: it may be torch that cannot be imported."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def advice(error: Exception, torch: str, report: str) -> str:
    """What to do about what stopped the import."""
    if isinstance(error, (OSError, KeyError)) and not isinstance(error, ImportError):
        # torch makes Inductor's cache folder, which it names after the user, while it is imported.
        return "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written, and HOME and USER if they are not set"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(("sparge", "torch.")):
        return f"pip install {error.name}"
    return f"is torch {torch} one of the supported ones, 2.11 to 2.15? If so, {report}"
