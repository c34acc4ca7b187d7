"""Every way to build the native kernel gives the reference's numbers: instruction sets, sanitizers, Arm.

What this CPU, its compiler or its emulator cannot do is skipped, with the reason.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest
import torch
from native_cases import (
    INF,
    NAMED,
    NAN,
    ODD,
    SPOILS,
    UNTOUCHED,
    Case,
    Result,
    assert_expected,
    elements,
    expected,
    inputs,
    kernel_options,
    new_output,
    run_library,
    tiles,
)
from torch import Tensor

from sparge_kernels.cpu import build, native

NATIVE = "-mcpu=native" if platform.machine().lower() in ("aarch64", "arm64") else "-march=native"
AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
INSTRUCTION_SETS = {  # flags, and what the CPU must have
    "native": ((NATIVE,), set()),
    "generic": ((NATIVE, "-DSPARGE_GENERIC"), set()),
    "avx512-vnni": (("-march=x86-64-v4", "-mavx512vnni"), AVX512 | {"avx512_vnni"}),
    "avx512": (("-march=x86-64-v4",), AVX512),
    "avx2": (("-march=x86-64-v3",), {"avx2", "fma", "bmi2", "f16c", "movbe"}),
    "sse": (("-march=x86-64-v2",), {"sse4_2", "ssse3", "popcnt"}),
}
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS")
ARM = ("-mcpu=neoverse-n1", "-static")
DRIVER = Path(__file__).with_name("native_driver.cpp").read_text()
EMPTY = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
EXP2 = """
#include <cstdio>
#include <vector>
#include "simd.h"
int main() {
    using namespace sparge;
    std::vector<float> precise, rough;
    for (float x[LANES]; std::fread(x, sizeof x, 1, stdin) == 1;)
        for (int lane = 0; lane < LANES; ++lane) {
            precise.push_back(exp2<true>(load(x))[lane]);
            rough.push_back(exp2<false>(load(x))[lane]);
        }
    for (const auto* result : {&precise, &rough}) std::fwrite(result->data(), sizeof(float), result->size(), stdout);
}
"""


def test_the_cases_reach_what_they_are_for():
    assert expected(NAMED["fp32"]).density.mean() < 0.7
    assert 0.2 < expected(NAMED["skips"]).pv_skipped.mean() < 1
    for name in SPOILS:
        lost = expected(NAMED[f"{name}-not-finite"]).output.isnan()
        assert lost.any() and not lost.all(), name


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    """The command that the builder would take."""
    found = [[name] for name in build.COMPILERS if shutil.which(name)]
    if not os.environ.get("CXX") and not found:
        pytest.skip("there is no C++ compiler")
    return shlex.split(os.environ.get("CXX", "")) or found[0]


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def variant(request, compiler, tmp_path_factory):
    """Name, library and what the compiler said."""
    (arch, *extra), needed = INSTRUCTION_SETS[request.param]
    if missing := needed - set(build.cpu_features().split()):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(build, "_results", {})
        library = build.load(arch, extra=extra)
        yield request.param, library, build.library_path(arch, extra=extra).with_name("build.log").read_text()


def test_an_instruction_set_builds_without_a_warning(variant):
    _, _, log = variant
    assert [line for line in log.splitlines() if "warning: " in line and str(build.SOURCES) in line] == []


@pytest.mark.parametrize("case", NAMED.values(), ids=NAMED.keys())
def test_an_instruction_set_gives_the_references_result(variant, case):
    name, library, _ = variant
    assert_expected(run_library(library, case), case, bf16=name == "native")


def test_an_instruction_set_gives_the_references_result_at_odd_sizes(variant):
    name, library, _ = variant
    for case in ODD:
        assert_expected(run_library(library, case), case, bf16=name == "native")


def program(folder: Path, compiler: Sequence[str], flags: Sequence[str], source: str) -> str:
    """Compiles a program with the kernel's own flags, and `flags` on top."""
    path = folder / "program.cpp"
    path.write_text(source)
    own = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    command = [*compiler, *own, f"-I{build.SOURCES}", *flags, str(path), "-o", str(path.with_suffix(""))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return str(path.with_suffix(""))


def skip_unless_it_runs(
    folder: Path, compiler: Sequence[str], flags: Sequence[str], runner: Sequence[str] = ()
) -> None:
    try:
        done = subprocess.run([*runner, program(folder, compiler, flags, EMPTY)], capture_output=True, text=True)
        reason = done.stderr if done.returncode else None
    except RuntimeError as error:
        reason = str(error)
    if reason is not None:
        pytest.skip(f"{compiler[0]} {' '.join(flags)} makes no program that runs here: {reason.strip()[-200:]}")


def run_driver(folder: Path, command: Sequence[str], cases: Sequence[Case]) -> list[Result]:
    """The results of all cases, computed by native_driver.cpp in one process."""
    calls, results = folder / "calls", folder / "results"
    outputs = [new_output(case) for case in cases]
    with calls.open("wb") as file:
        for case, out in zip(cases, outputs, strict=True):
            *qkv, mask = inputs(case)
            call = native.describe(*qkv, [case.thresholds] * case.heads, mask, **kernel_options(case, out))
            call.threads = case.threads
            file.write(bytes(call))
            entries = b"".join(bytes(call.thresholds[head]) for head in range(case.heads))
            for content in (*(_bytes(x) for x in (*qkv, out, mask)), entries):
                file.write(struct.pack("<q", len(content)) + content)
    # To look for leaks takes ptrace, which containers may forbid.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    arguments = [*command, str(calls), str(results)]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **options})
    assert done.returncode == 0, done.stderr
    with results.open("rb") as file:
        found = [_read_result(file, case, out) for case, out in zip(cases, outputs, strict=True)]
        assert file.read() == b""
    return found


def _bytes(x: Tensor | None) -> bytes:
    return b"" if x is None else elements(x).view(torch.uint8).numpy().tobytes()


def _read_result(file: IO[bytes], case: Case, out: Tensor) -> Result:
    def read(dtype: torch.dtype, *shape: int) -> Tensor:
        content = file.read(torch.Size(shape).numel() * dtype.itemsize)
        return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)

    written = read(case.dtype, len(elements(out)))
    output = written.as_strided(out.shape, out.stride())
    result = output.clone()
    output.fill_(UNTOUCHED)
    assert (written == UNTOUCHED).all(), f"wrote between the rows: {case}"
    heads = (case.batch, case.heads)
    density, pv_skipped = (read(torch.float32, *heads) for _ in range(2))
    return Result(result, density, pv_skipped, read(torch.bool, *heads, *tiles(case)))


@pytest.mark.parametrize("name", ["native", "generic"])
def test_the_sanitizers_find_nothing(tmp_path, compiler, name):
    flags = (*INSTRUCTION_SETS[name][0], *SANITIZED)
    skip_unless_it_runs(tmp_path, compiler, flags)
    driver = program(tmp_path, compiler, flags, DRIVER)
    cases = [*NAMED.values(), *ODD]
    for case, result in zip(cases, run_driver(tmp_path, [driver], cases), strict=True):
        assert_expected(result, case, bf16=name == "native")


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> tuple[str, str]:
    """Compiler for, and emulator of, another CPU."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not (compiler and emulator):
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    skip_unless_it_runs(tmp_path_factory.mktemp("arm"), [compiler], ARM, [emulator])
    return compiler, emulator


def test_arm_gives_the_references_result(tmp_path, arm):
    cross_compiler, emulator = arm
    driver = program(tmp_path, [cross_compiler], ARM, DRIVER)
    cases = [*NAMED.values(), *ODD[::3]]
    for case, result in zip(cases, run_driver(tmp_path, [emulator, driver], cases), strict=True):
        assert_expected(result, case, bf16=False)


@pytest.fixture(scope="module")
def exponents() -> Tensor:
    """All of [-130, 0] densely, whole numbers and their neighbours, tiny and huge ones: whole vectors, [16 n]."""
    whole = torch.arange(-130.0, 1.0)
    edges = [whole, whole.nextafter(torch.tensor(1.0)).clamp(max=0), whole.nextafter(torch.tensor(-200.0))]
    special = torch.tensor([-INF, NAN, -0.0, -1e-30, -1e-8, -1e4, -3e38])
    x = torch.cat([torch.linspace(-130, 0, 2_000_000), *edges, special])
    return torch.cat([x, torch.zeros(-len(x) % 16)])


def assert_exp2(command: Sequence[str], exponents: Tensor) -> None:
    """The bounds that simd.h states, and that no number depends on its lane."""

    def run(x: Tensor) -> Tensor:
        done = subprocess.run(command, input=x.numpy().tobytes(), capture_output=True, check=True)
        return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(2, -1)

    results, exact = run(exponents), exponents.double().exp2()
    torch.testing.assert_close(run(exponents.flip(0)).flip(1), results, rtol=0, atol=0, equal_nan=True)
    normal, tiny = exponents >= -126, exponents < -126
    for result, bound in zip(results, (1.8e-7, 7.5e-5), strict=True):
        assert torch.equal(result.isnan(), exponents.isnan())
        assert (result[normal] / exact[normal] - 1).abs().max() < bound
        assert (result[tiny] - exact[tiny]).abs().max() <= 2.0**-126 and (result[tiny] >= 0).all()
        assert (result[exponents < -150] == 0).all()


def test_exp2_is_as_exact_as_stated(tmp_path, variant, compiler, exponents):
    flags, _ = INSTRUCTION_SETS[variant[0]]
    assert_exp2([program(tmp_path, compiler, flags, EXP2)], exponents)


def test_exp2_is_as_exact_as_stated_on_arm(tmp_path, arm, exponents):
    cross_compiler, emulator = arm
    assert_exp2([emulator, program(tmp_path, [cross_compiler], ARM, EXP2)], exponents)
