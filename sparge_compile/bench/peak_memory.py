"""Peak extra memory of one `sparge::attention` call, beyond its inputs and output; on a CPU in a process of its own.

`extra_bytes` starts this module as a program, which prints the number. It reads the process's own high-water mark
(VmHWM of /proc) after resetting it: ru_maxrss also remembers what the parent held when it started the process. The
kernel counts resident pages by processor, so the last few hundred kilobytes are noise.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparge_compile.bench.problem import Problem, share

if TYPE_CHECKING:
    from sparge_compile.bench.peers import Call

from sparge_kernels import ops  # noqa: F401 - registers the operator
from sparge_kernels.thresholds import pack

WARM_UP_TOKENS = 256
# Every buffer comes from the system and goes back to it, so that the call cannot reuse what warming up left behind.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}


def extra_bytes(problem: Problem, threads: int) -> int | None:
    """Bytes that a call of the problem's shape and density takes at its peak; None where they cannot be measured.

    The numbers are random: with a density, how many tiles a call computes does not depend on them.
    """
    q, k, v = (x.shape for x in problem.inputs)
    if problem.choice.density is None or not q == k == v or not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", __name__, *map(str, q), str(problem.choice.density), str(problem.dtype)[6:]]
    command += [problem.precision, str(threads)] + ["--causal"] * problem.is_causal
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return int(result.stdout)


def extra_bytes_on_gpu(call: Call) -> int:
    """Of any call on the current GPU, as torch's allocator counts it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output.numel() * output.element_size()


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is the resident memory, VmHWM the largest there was."""
    match = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match, f"/proc/self/status has no {name}"
    return int(match[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", type=int, nargs=4)
    parser.add_argument("density", type=float)
    parser.add_argument("dtype")
    parser.add_argument("precision")
    parser.add_argument("threads", type=int)
    parser.add_argument("--causal", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    thresholds = pack([share(args.density).thresholds])

    def inputs(tokens: int) -> list[Tensor]:
        shape = (*args.shape[:2], tokens, args.shape[3])
        return [torch.empty(shape, dtype=getattr(torch, args.dtype)).uniform_(-1, 1) for _ in range(3)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"thresholds": thresholds, "is_causal": args.causal, "precision": args.precision}
        return torch.ops.sparge.attention.default(q, k, v, **options)

    call(*inputs(WARM_UP_TOKENS))
    tensors = inputs(args.shape[2])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = memory("VmRSS")
    output = call(*tensors)
    print(max(0, memory("VmHWM") - before - output.numel() * output.element_size()))


if __name__ == "__main__":
    main()
