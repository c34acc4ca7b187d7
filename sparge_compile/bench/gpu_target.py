"""The benchmark on a GPU."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparge_compile.bench import gpu_machine, gpu_roofline, peak_memory
from sparge_compile.bench.accuracy import Check
from sparge_compile.bench.exact import ROWS, attention_rows, some_rows
from sparge_compile.bench.gpu_peers import GPU_PEERS, selected_tiles, stages
from sparge_compile.bench.peers import OURS, predicted_tiles
from sparge_compile.bench.rows import Row
from sparge_compile.bench.table import GPU_COLUMNS, prepare_table
from sparge_compile.bench.target import Target
from sparge_compile.bench.timing import Stopwatch, event_stopwatches

DEFAULTS = {
    "tokens": [4096, 8192, 16384, 32768, 65536],
    "head_dim": [128, 64],
    "heads": 32,
    "causal": "both",
    "dtype": "bfloat16",
    "repeats": 40,
    "budget_seconds": 450.0,
}

LEGEND = f"""
Every variant of a shape, at every density, runs in turn within each round; times are medians over the rounds of the
time on the GPU between two events, with the cache flushed before and the host far enough ahead, as in a CUDA graph or
behind other work; `issue` is what the host takes to issue the call. Baseline: the fastest dense variant. Speed: median
over the rounds of baseline time / time, with its smallest and largest value. Effective TFLOPS: operations of the whole
dense problem, halved for causal, over the time. Dense variants compute every tile.
`{OURS}` is the whole operator; prepare (stage 1 and quantization) and loop are its two parts, timed apart.
`flex` is compiled FlexAttention over the tiles that `{OURS}` keeps; choosing them is not in its time.
Of the roofline: time of the two products of the computed tiles at the ceilings above (INT8 and the inputs' dtype for
`{OURS} int8`), or of moving Q, K, V and the output once where that is more, over the time.
Errors are those of {ROWS} rows of each head, in fp64; `{OURS}` and `flex` were also compared with fp64 attention over
the same tiles, with each other, and `{OURS}` with the specification's choice of tiles and output.
Extra memory: what one call takes at its peak beyond inputs and output.
"""


def target(
    device: torch.device | None = None, stopwatch: Callable[[Callable[[], object]], Stopwatch] | None = None
) -> Target:
    """On the current GPU; tests give another device and stopwatch."""
    device = torch.device("cuda", torch.cuda.current_device()) if device is None else device
    torch.set_float32_matmul_precision("highest")  # no TF32 in the specification, whatever the environment says
    watch = event_stopwatches(device) if stopwatch is None else stopwatch
    return Target(
        device=device,
        peers=GPU_PEERS,
        defaults=DEFAULTS,
        columns=GPU_COLUMNS,
        legend=LEGEND,
        facts=lambda threads: gpu_machine.describe(device),
        stopwatch=watch,
        expected=some_rows,
        extra_bytes=lambda problem, call: peak_memory.extra_bytes_on_gpu(call) if device.type == "cuda" else None,
        input_bytes=lambda problem: sum(x.numel() * x.element_size() for x in problem.inputs),
        checked_tiles=checked_tiles,
        stages=stages,
        ceilings=functools.partial(gpu_roofline.measure, device, stopwatch=watch),
        closing=closing,
        facts_after=lambda: {f"{name}, after": value for name, value in gpu_machine.state(device).items()},
        warm_up=2,
        one_block=True,
    )


def closing(args: argparse.Namespace, rows: Sequence[Row]) -> tuple[list[str], dict[str, Any]]:
    lines = prepare_table(rows, args.densities[0])
    if not lines:
        return [], {}
    words = f"Stage 1 and quantization, at density {args.densities[0]:g}:"
    return [words, "\n".join(lines)], {}


def checked_tiles(check: Check) -> Check:
    """The same with exact attention over the kept tiles, and how they differ from what the specification would keep."""
    kept = selected_tiles(check.problem)
    differ = (kept != predicted_tiles(check.problem)).sum() / (kept.numel())
    assert check.expected.rows is not None
    exact = attention_rows(check.problem, check.expected.rows, kept)
    return replace(check, kept=exact, selection=float(differ))
