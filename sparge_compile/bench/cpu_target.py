"""The benchmark on a CPU."""

from __future__ import annotations

import torch

from sparge_compile.bench import machine, peak_memory
from sparge_compile.bench.exact import every_row
from sparge_compile.bench.peers import CPU_PEERS, OURS, Call
from sparge_compile.bench.problem import Problem
from sparge_compile.bench.table import CPU_COLUMNS
from sparge_compile.bench.target import Target
from sparge_compile.bench.timing import wall_clock

DEFAULTS = {
    "tokens": [8192, 16384],
    "head_dim": [64],
    "heads": 8,
    "causal": "no",
    "dtype": "float32",
    "repeats": 5,
}

LEGEND = f"""
Every variant of a block (one shape, one density) runs in turn within each repeat; times are medians. Baseline: the
faster dense variant. Speed: median over the repeats of baseline time / time, with its smallest and largest value.
Effective GFLOPS: operations of the whole dense problem, halved for causal, over the time. Dense variants compute every
tile. `{OURS}` at "1 tile a row" (and the diagonal, if causal) bounds from above what predicting and quantizing take.
`flex` is compiled FlexAttention over the tiles that `{OURS}` keeps; choosing them is not in its time.
Extra memory: what one call of `{OURS}` takes at its peak beyond inputs and output, to half a megabyte.
"""


def target() -> Target:
    return Target(
        device=torch.device("cpu"),
        peers=CPU_PEERS,
        defaults=DEFAULTS,
        columns=CPU_COLUMNS,
        legend=LEGEND,
        facts=machine.describe,
        stopwatch=wall_clock,
        expected=every_row,
        extra_bytes=_extra_bytes,
        input_bytes=lambda problem: sum(x.numel() * 4 for x in problem.inputs),
    )


def _extra_bytes(problem: Problem, call: Call) -> int | None:
    return peak_memory.extra_bytes(problem, torch.get_num_threads())
