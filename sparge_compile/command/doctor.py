"""`python -m sparge_compile doctor`: what is here, what is wrong, what to do about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from sparge_compile.command import building, hardware, kernels, self_test, software, speed, view
from sparge_compile.command.findings import Diagnosis, Finding, Section, examine

SECTIONS: dict[str, Callable[[], Iterable[Finding]]] = {
    "Versions": software.versions,
    "Environment variables": software.environment,
    "Machine": hardware.look,
    "Compiler and caches": building.look,
    "Kernels": kernels.look,
    "Self-test against dense attention in fp64": self_test.look,
    "OpenMP": hardware.openmp,  # after everything that loads a runtime
    "Speed": speed.look,
}


def sections() -> Iterator[Section]:
    """Every section, each whatever the others find."""
    for title, look in SECTIONS.items():
        with view.progress() as announce:
            announce(title)
            section = examine(title, look)
        yield section


def run(as_json: bool) -> int:
    """Prints the diagnosis; the exit status: 0 if all is well, 1 if something is wrong.

    Text section by section: what a section examines may kill the process, and those before it must have been said.
    """
    start, found = time.monotonic(), []
    for section in sections():
        found.append(section)
        if not as_json:
            view.show_section(section)
    diagnosis = Diagnosis(tuple(found))
    if as_json:
        view.write_json(diagnosis.to_json(), "-")
    else:
        view.show_problems(diagnosis, time.monotonic() - start)
    return diagnosis.code
