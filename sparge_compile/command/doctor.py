"""`python -m sparge_compile doctor`: what is here, what is wrong, what to do about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from sparge_compile.command import building, hardware, kernels, self_test, software, view
from sparge_compile.command.findings import Diagnosis, Finding, examine

SECTIONS: dict[str, Callable[[], Iterable[Finding]]] = {
    "Versions": software.versions,
    "Environment variables": software.environment,
    "Machine": hardware.look,
    "Compiler and caches": building.look,
    "Kernels": kernels.look,
    "Self-test against dense attention in fp64": self_test.look,
    "OpenMP": hardware.openmp,  # after everything that loads a runtime
    "Speed": self_test.speed,
}


def diagnose(announce: Callable[[str], None] = lambda words: None) -> Diagnosis:
    """Every section, each whatever the others find."""
    sections = []
    for title, look in SECTIONS.items():
        announce(title)
        sections.append(examine(title, look))
    return Diagnosis(tuple(sections))


def run(as_json: bool) -> int:
    """Prints the diagnosis; the exit status: 0 if all is well, 1 if something is wrong."""
    start = time.monotonic()
    with view.progress() as announce:
        diagnosis = diagnose(announce)
    if as_json:
        view.write_json(diagnosis.to_json(), "-")
    else:
        view.show_diagnosis(diagnosis, time.monotonic() - start)
    return diagnosis.code
