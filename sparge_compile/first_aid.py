"""What `python -m sparge_compile doctor` says where it cannot even start: this package, or torch, cannot be imported.

Python imports the package before it runs the command, so this comes first in the package's `__init__`. For everything
else that imports the package it does nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from types import TracebackType

COMMAND = ["-m", "sparge_compile", "doctor"]


def is_doctor(argv: list[str]) -> bool:
    """Was Python started as the doctor?"""
    return any(argv[at : at + len(COMMAND)] == COMMAND for at in range(len(argv)))


def install() -> None:
    """Whatever stops the doctor becomes a diagnosis with one problem, and exit status 1, in place of a traceback."""
    from sparge_compile.command import findings  # now: once the package has failed, nothing of it can be imported

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception):
            sys.__excepthook__(kind, error, trace)
            return
        found = [findings.Finding("Python", platform.python_version()), findings.Finding("torch", torch_version())]
        words = " ".join(str(error).split())
        what = f"cannot start ({type(error).__name__}: {words})"
        found.append(findings.problem("doctor", what, advice(error, torch_version(), findings.REPORT)))
        diagnosis = findings.Diagnosis((findings.Section("Versions", found),))
        if "--json" in sys.argv + sys.orig_argv:
            print(json.dumps(diagnosis.to_json(), indent=2))
            return
        for one in found:
            print(f"{one.name}: {one.value}" + (f" -> {one.advice}" if one.advice else ""))

    sys.excepthook = tell


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


if is_doctor(sys.orig_argv):
    install()
