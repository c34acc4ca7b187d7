"""The GPU kernels compile for every supported GPU, without one: see benchmarks/triton_resources.py.

In other processes: this one's Triton may be an interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(900)  # a minute or two, more beside other work
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OLD_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942")

# Kernels that must not pass: each is one call under compiling_for(), written to a file because Triton reads sources.
KERNELS = """
import dataclasses, json, sys
import torch, triton, triton.language as tl
sys.path.insert(0, {benchmarks!r})
from cross_compile import TARGETS, compiling_for
from sparge_kernels.triton import launch
from triton_checks import faults
from triton_variants import Variant

@triton.jit
def spilling_kernel(x_ptr, SIZE: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE)
    x = tl.load(at)
    for _ in range(4):
        x += tl.cumsum(x * x, 0)
    tl.store(at, x)

@triton.jit
def attend_kernel(x_ptr, IEEE: tl.constexpr, INT8: tl.constexpr):
    at = x_ptr + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(at)
    if INT8:
        y = tl.dot(x.to(tl.int8), x.to(tl.int8)).to(tl.float32)
    else:
        y = tl.dot(x, x, input_precision="ieee" if IEEE else "tf32")
    tl.store(at, y)

@triton.jit
def broken_kernel(x_ptr):
    tl.store(x_ptr, tl.arange(0, 3))

x = torch.empty(1 << 20, device="meta")
variant = Variant(torch.float32, 64, precision="none")
target, amd = TARGETS[sys.argv[1]], sys.argv[1].startswith("gfx")
with compiling_for(target) as compiled:
    launch.run(spilling_kernel, (1,), x, SIZE=65536 if amd else 16384, num_warps=1)
    launch.run(attend_kernel, (1,), x, IEEE=True, INT8=False, num_warps=8)
    launch.run(attend_kernel, (1,), x, IEEE=False, INT8=True, num_warps=4)
    launch.run(attend_kernel, (1,), x, IEEE=amd, INT8=False, num_warps=4, num_stages=1)
    launch.run(broken_kernel, (1,), x)
spills, scalar, integers, good, broken = compiled
large = dataclasses.replace(good, shared=target.shared_limit + 1)
print(json.dumps([faults(kernel, variant) for kernel in (spills, scalar, integers, good, broken, large)]))
"""


def run(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=880, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills_by_matrix_instructions_and_takes_what_the_committed_table_says(target):
    # A process for each target, so that processes of pytest-xdist share the work: all in one fixture, each did it all.
    options = ("--core", "--check", "--json", "--processes", "1", "--targets", target)
    found = json.loads(run(str(BENCHMARKS / "triton_resources.py"), *options).splitlines()[-1])
    faults = found["faults"]
    if OLD_TRITON:  # seen of 3.6: it spills, and sm100 does not compile at all (docs/kernels.md)
        faults = [fault for fault in faults if " spills " not in fault]
        if target == "sm100":
            faults = [fault for fault in faults if "does not compile" not in fault]
    assert found["kernels"] > 10
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
def test_the_check_sees_what_is_wrong_with_a_kernel_and_passes_a_good_one(target, tmp_path):
    script = tmp_path / "wrong_kernels.py"
    script.write_text(KERNELS.format(benchmarks=str(BENCHMARKS)))
    spills, scalar, integers, good, broken, large = json.loads(run(str(script), target))
    for faults, words in (
        (spills, "spills"),
        (integers, "matrix instructions"),
        (broken, "does not compile"),
        (large, "shared memory"),
    ):
        assert any(words in fault for fault in faults)
    assert good == []
    if target != "gfx942":  # which has matrix instructions for fp32
        assert any("without matrix instructions" in fault for fault in scalar)
