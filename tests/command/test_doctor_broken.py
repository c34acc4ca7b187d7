"""Broken machines: no traceback, a problem with what to do about it, and exit status 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from sparge_compile.command import building, doctor, first_aid, main, self_test, speed
from sparge_compile.command.findings import examine
from sparge_kernels import ops
from sparge_kernels.cpu import KERNEL_VARIABLE, build, native

needs_native = pytest.mark.skipif(os.name == "nt", reason="nothing is built on Windows")


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """An empty cache, and a process that has built nothing yet."""
    monkeypatch.setattr(build, "_results", {})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(self_test, "CASES", self_test.CASES[:1])
    monkeypatch.setattr(self_test, "COMPILED", self_test.COMPILED[:1])
    monkeypatch.setattr(speed, "TOKENS", 256)


def problems(capsys):
    """Of a run: what is wrong -> what to do."""
    assert doctor.run(as_json=True) == 1
    content = json.loads(capsys.readouterr().out)
    assert not content["ok"] and content["exit_code"] == 1
    assert all(one["do"] for one in content["problems"])
    return {one["what"]: one["do"] for one in content["problems"]}


def the_one(found, words):
    (one,) = [what for what in found if words in what]
    return found[one]


@needs_native
def test_a_compiler_that_is_not_there(nothing_built, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent")
    found = problems(capsys)
    assert the_one(found, "C++ compiler: CXX is set to '/nonexistent'").startswith("Set it to a C++ compiler")
    assert the_one(found, "cpu: no kernel, attention stays dense").startswith("Set it to a C++ compiler")
    assert len(found) == 2


@needs_native
def test_an_empty_path(nothing_built, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert "apt-get install g++" in the_one(problems(capsys), "C++ compiler: there is no C++ compiler")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A program that CXX names."""
    path = tmp_path / "compiler"

    def write(program):
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return write


@needs_native
def test_a_compiler_that_fails(nothing_built, compiler, capsys):
    compiler('echo "error: no such header" >&2; exit 1')
    found = problems(capsys)
    assert "set CXX to another" in the_one(found, "does not compile with OpenMP (exit status 1: error: no such header)")
    assert "build.log" in the_one(found, "native CPU kernel: ") and "no such header" in " ".join(found)


@needs_native
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("exit 0", "compiles nothing: it is no C++ compiler"),
        ('[ "$1" = --version ] && echo 1.0', "exit status 1: no output"),
        ('case "$*" in *-fopenmp*) echo no OpenMP >&2; exit 1;; *) exec g++ "$@";; esac', "exit status 1: no OpenMP"),
    ],
    ids=["does nothing", "has a version only", "has no OpenMP"],
)
def test_what_is_no_compiler_for_this(compiler, program, words):
    compiler(program)
    found = building.compiler()
    assert found.level == "problem" and words in found.value and found.advice.startswith("set CXX to another")


@needs_native
def test_a_compiler_that_compiles_needs_no_version(compiler):
    compiler('[ "$1" = --version ] && exit 1; exec g++ "$@"')
    found = building.compiler()
    assert found.level == "ok" and found.value.endswith("/compiler")


@needs_native
def test_a_cached_kernel_that_kills_who_loads_it(nothing_built, tmp_path, capsys):
    source, library = tmp_path / "deadly.cpp", build.library_path()
    source.write_text("#include <cstdlib>\n__attribute__((constructor)) static void die() { abort(); }\n")
    library.parent.mkdir(parents=True)
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    found = problems(capsys)
    do = "Build it anew: python -m sparge_kernels.cpu.build --force"
    assert the_one(found, f"native CPU kernel: {library} kills the process that loads it (Aborted)") == do
    assert the_one(found, "cpu: no kernel, attention stays dense") == do


@needs_native
def test_a_cache_folder_that_cannot_be_written(nothing_built, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    assert "TORCH_EXTENSIONS_DIR" in the_one(problems(capsys), "torch's extensions: ")


def test_a_kernel_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setenv(KERNEL_VARIABLE, "magic")
    found = problems(capsys)
    assert "or set it to one of these" in the_one(found, "SPARGE_CPU_KERNEL: ")
    assert the_one(found, "cpu: no kernel") == "unset SPARGE_CPU_KERNEL"
    assert os.environ[KERNEL_VARIABLE] == "magic"  # the self-test of other kernels has put it back


@needs_native
@pytest.mark.parametrize("how", ["wrong", "nan", "dies"])
def test_a_native_kernel_that_is_broken(monkeypatch, capsys, how):
    sound = native.attention

    def broken(*args, out, **options):
        if how == "dies":
            raise MemoryError("no memory")
        statistics = sound(*args, out=out, **options)
        out.mul_(1.2 if how == "wrong" else float("nan"))
        return statistics

    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    monkeypatch.setattr(native, "attention", broken)
    found = problems(capsys)
    words = "MemoryError: no memory" if how == "dies" else "WRONG NUMBERS, relative L1"
    assert "do not use this backend here" in the_one(found, f"native on cpu: plain: {words}")
    assert the_one(found, "torch.compile on cpu: ")
    assert not any("times as fast" in one.value for one in examine("Speed", speed.look).findings)


def compiled():
    return self_test.check(self_test.COMPILE, self_test.by_compile, self_test.CPU, self_test.COMPILED)


def test_a_backend_that_is_never_called(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = compiled()
    assert found.level == "problem" and "never called" in found.value and "TORCHDYNAMO_DISABLE" in found.advice


def test_a_call_that_is_not_rewritten(monkeypatch):
    monkeypatch.setattr(ops, "unavailable", lambda *_: "the kernel is on holiday")
    with pytest.warns(UserWarning, match="none of 1 attention calls"):
        found = compiled()
    assert found.level == "problem" and "the kernel is on holiday" in found.value


def run_python(*arguments, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280, env=env)


def test_no_triton_no_compiler_and_no_kernel_of_that_name(tmp_path):
    hidden = "import sys; sys.modules['triton'] = None; sys.modules['matplotlib'] = None\n"
    program = hidden + "from sparge_compile.command import main\nsys.exit(main(['doctor']))"
    broken = {"PATH": "", "CXX": "", "TORCH_EXTENSIONS_DIR": str(tmp_path), KERNEL_VARIABLE: "magic"}
    result = run_python("-c", program, **broken)
    assert result.returncode == 1 and "Traceback" not in result.stdout + result.stderr
    assert "cannot be imported" in result.stdout and "only GPUs need it" in " ".join(result.stdout.split())
    assert "problems (" in result.stdout.splitlines()[-1]


def test_a_package_that_cannot_be_imported(tmp_path):
    """torch makes Inductor's cache folder while it is imported, which no command of this package can prevent."""
    (tmp_path / "file").write_text("")
    result = run_python("-m", "sparge_compile", "doctor", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file" / "folder"))
    assert result.returncode == 1 and result.stderr == ""
    assert "-> set TORCHINDUCTOR_CACHE_DIR to a folder that can be written" in result.stdout


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'tqdm'", name="tqdm"), "pip install tqdm"),
        (ImportError("cannot import name 'x' from 'torch._dynamo'"), "is torch 2.9 one of the supported ones"),
        (KeyError("getpwuid(): uid not found: 1234"), "TORCHINDUCTOR_CACHE_DIR"),
    ],
    ids=["package", "torch", "user"],
)
def test_first_aid_says_what_to_do(error, words):
    assert words in first_aid.advice(error, "2.9", "report it")


def test_no_torch():
    program = (
        "import sys; sys.modules['torch'] = None\nfrom sparge_compile.command import main\nsys.exit(main(['doctor']))"
    )
    result = run_python("-c", program)
    assert result.returncode == 1 and "-> pip install torch" in result.stdout and result.stderr == ""


def test_what_stops_the_doctor_is_told_as_json(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sparge_compile.command.doctor", None)
    assert main(["doctor", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["exit_code"] == 1 and "ModuleNotFoundError" in content["problems"][0]["what"]
