"""What the tests of the builder share: a few lines of C++ to build, an empty cache, a compiler that counts."""

import subprocess
import sys
import time

import pytest

from sparge_kernels.cpu import build

SOURCE = '#include "number.h"\nextern "C" int answer() { return NUMBER; }\n'
PARALLEL = """
extern "C" int answer() {
    int total = 0;
    #pragma omp parallel for reduction(+ : total)
    for (int i = 0; i < 42; i++) total++;
    return total;
}
"""
# A compiler that adds its process to $CALLS, then waits in a child until $CALLS.hold is gone.
COMPILER = """#!/bin/sh
echo $$ >> "$CALLS"
(while [ -e "$CALLS.hold" ]; do sleep 0.05; done; echo released >> "$CALLS.released")
exec g++ "$@"
"""
PROGRAM = """
import sys
from pathlib import Path
from sparge_kernels.cpu import build
build.SOURCES = Path(sys.argv[1])
print(build.load().answer())
"""
BUILDING = r"sparge: building the CPU kernel with \S+ \(once per machine; about 5 s\) \.\.\. "
WAITING = "sparge: another process is building the CPU kernel; waiting for it\n"


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(build, "_results", {})


def start(sources, stderr):
    command = [sys.executable, "-c", PROGRAM, str(sources)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr.open("w"), text=True)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def reason(**options):
    with pytest.raises(build.Unavailable) as caught:
        build.load(**options)
    return str(caught.value)


def files():
    return sorted(path.name for path in build.library_path().parent.glob("*"))
