"""An empty cache, a few lines of C++ to build in place of the kernel, and a compiler that counts."""

import sys
import types

import pytest
from build_cases import COMPILER, SOURCE, forget

from sparge_kernels.cpu import build


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    """A folder of sources, an empty cache, and a process that has built nothing yet."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    (folder / "number.h").write_text("#define NUMBER 42\n")
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    forget(monkeypatch)
    return folder


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The process ids of COMPILER so far, as a function; its hold is the file `calls.hold` beside the sources."""
    compiler, path = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("CALLS", str(path))
    return lambda: [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def self_check(monkeypatch):
    """The module whose `self_check` the command line asks, empty but for that."""
    native = types.ModuleType("sparge_kernels.cpu.native")
    native.self_check = lambda library: None
    monkeypatch.setitem(sys.modules, native.__name__, native)
    return native
