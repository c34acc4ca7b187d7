"""`python -m sparge_compile bench`: the user's shapes, dense peers beside this kernel, and a verdict in words."""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparge_compile.bench import machine, verdict
from sparge_compile.bench.budget import SETTING_UP, Budget, seconds_needed
from sparge_compile.bench.inputs import InputsError, load_problem
from sparge_compile.bench.peers import DENSE, OURS, Peer, dense, optional_peers
from sparge_compile.bench.problem import (
    DTYPES,
    Choice,
    Problem,
    dense_flops,
    of_policy,
    outline,
    share,
    smooth_problem,
)
from sparge_compile.bench.rows import Row, Shape, in_words
from sparge_compile.bench.target import Target
from sparge_compile.bench.targets import TARGETS, KernelUnavailable, Targets, find
from sparge_compile.command.bench_options import ASK_THE_DOCTOR, complete
from sparge_compile.command.bench_result import Measured, Result
from sparge_compile.policy import Policy
from sparge_kernels.records import is_out_of_memory

# As SETTING_UP. A size runs twenty calls at least, and this stands for one of twenty parts of a second or so.
SETTING_UP_ON_CPU = 5e9
SMALL_TOKENS, SMALL_HEADS = 512, 2  # what the reference computes in a fraction of a second
# Of the kernel with every tile, whatever is allowed of the chosen thresholds: INT8 on inputs with outliers loses some.
MAX_ERROR_OF_ALL_TILES = 0.05


def choose_peers(
    parser: argparse.ArgumentParser, target: Target, asked: Sequence[str] | None, max_error: float
) -> dict[str, Peer]:
    """Ours, the dense ones and those asked for. On a CPU nobody asks for flex: it compiles 10 s a shape."""
    allowed = optional_peers(target.peers)
    if unknown := set(asked or ()) - set(allowed):
        parser.error(f"--peers {' '.join(sorted(unknown))}: no such peer; allowed: {', '.join(allowed)}.")
    wanted = {OURS, DENSE, *((allowed if target.device.type == "cuda" else ()) if asked is None else asked)}
    peers = {name: peer for name, peer in target.peers.items() if name.split()[0] in wanted}
    return {**peers, OURS: replace(peers[OURS], exact_limit=min(max_error, MAX_ERROR_OF_ALL_TILES))}


def with_dense_types(peers: dict[str, Peer], dtype: torch.dtype) -> dict[str, Peer]:
    """The same with dense attention in the call's own dtype, and in bf16 where the call is fp32."""
    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    limits = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
    wanted = {dtype, torch.bfloat16} if dtype == torch.float32 else {dtype}
    if "dense default" in peers:  # that is the one in the call's dtype
        wanted.discard(dtype)
    added = {f"dense {types[one]}": Peer(dense(one), False, limits[one]) for one in wanted}
    return {**{name: peer for name, peer in added.items() if name not in peers}, **peers}


@dataclass(frozen=True)
class Size:
    """What makes the problem, so that only one is in memory, and what makes its outline; 0 tokens: the file knows."""

    tokens: int
    make: Callable[[], Problem]
    outline: Callable[[], Problem]


def sizes_asked(args: argparse.Namespace, device: torch.device) -> list[Size]:
    """From the shortest: what there is no time for is the longest."""
    common: dict[str, Any] = {"is_causal": args.causal, "precision": args.precision, "device": device}
    common["dtype"] = None if args.dtype is None else DTYPES[args.dtype]
    if args.inputs is not None:
        load = functools.partial(load_problem, args.inputs, **common)
        return [Size(0, load, load)]
    common.update(heads=args.heads, head_dim=args.head_dim, kv_heads=args.kv_heads, batch=args.batch)
    partial = functools.partial
    return [Size(one, partial(smooth_problem, one, **common), partial(outline, one, **common)) for one in args.tokens]


def main_choice(args: argparse.Namespace) -> Choice:
    """What the verdict is on: the default thresholds, or the user's topk."""
    policy = Policy(topk=args.topk)
    name = "default" if args.topk is None else f"topk {args.topk:g}"
    return of_policy(name, policy, args.causal, args.max_error, args.min_row_cosine)


def measure_size(args: argparse.Namespace, target: Target, size: Size, budget: Budget, at: int) -> Measured:
    """What comes of the size that the budget has at this place. What goes wrong is in the rows.

    Raises:
        InputsError: the user's file is no problem.
    """
    choice = main_choice(args)
    choices = [choice, *(share(density) for density in args.density)]
    problem, kept = None, None
    try:
        deadline = budget.deadline(at)
        if deadline is None:
            raise TimeoutError("no time left, raise --budget-seconds")
        problem = size.outline()
        kept = verdict.left_dense(problem)
        target = replace(target, peers=with_dense_types(dict(target.peers), problem.dtype))
        check_time(target, problem, len(choices), args.repeats, budget.left())
        problem = size.make()
        small = problem.part(SMALL_TOKENS, SMALL_HEADS)
        rows = Shape(target, problem, small, args.repeats, deadline, ours_or_none=True).measure(choices)
    except InputsError:
        raise
    except Exception as error:  # whatever a device may raise
        rows = [without_times(args, size.tokens, problem, error)]
    only_size = args.inputs is not None or len(args.tokens) == 1
    return Measured(rows, verdict.judge(rows, choice.name, kept, only_size), problem.facts if problem else None)


def check_time(target: Target, problem: Problem, choices: int, repeats: int, left: float) -> None:
    """TimeoutError where even the fewest rounds would take more seconds than are left."""
    sparse = sum(peer.sparse for peer in target.peers.values())
    needed = seconds_needed(problem, target.stopwatch, len(target.peers) - sparse, sparse * choices, repeats)
    if needed > left:
        raise TimeoutError(
            f"it needs about {needed:.0f} s and {max(left, 0):.0f} s of the budget are left, raise --budget-seconds"
        )


def without_times(args: argparse.Namespace, tokens: int, problem: Problem | None, error: Exception) -> Row:
    """The row of a size at which something raised: want of memory or of time is no failure of the kernel."""
    tokens, head_dim = (problem.q.shape[2:]) if problem else (tokens, args.head_dim)
    row = Row(tokens, head_dim, args.causal, None, f"{OURS} {args.precision}", main_choice(args).name)
    scarce = isinstance(error, TimeoutError) or is_out_of_memory(error) or problem is None
    row.trouble = "not measured" if scarce else "failed"
    row.note = str(error) if isinstance(error, TimeoutError) else in_words(error)
    return row


def measure(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    targets: Targets = TARGETS,
    announce: Callable[[str], None] = lambda words: None,
) -> Result:
    """Everything but printing. Exits with a message (2) on what cannot be asked.

    Raises:
        KernelUnavailable: there is no kernel to measure.
    """
    complete(parser, args)
    try:
        target = find(args.device, targets)
    except ValueError as error:
        parser.error(str(error))
    target = replace(
        target, peers=choose_peers(parser, target, args.peers, args.max_error), extra_bytes=lambda *_: None
    )
    torch.set_num_threads(args.threads)
    busy = machine.busy()
    sizes = sizes_asked(args, target.device)
    work = [dense_flops(tokens, args.heads, args.head_dim, args.causal) for tokens in args.tokens or []] or [1.0]
    setting_up = SETTING_UP if target.device.type == "cuda" else SETTING_UP_ON_CPU
    budget = Budget(args.budget_seconds, work, setting_up=setting_up)
    result = Result(target.facts(args.threads), _settings(args), target.device)
    try:
        for at, size in enumerate(sizes):
            announce(f"size {at + 1} of {len(sizes)}: checking, then timing")
            result.sizes.append(measure_size(args, target, size, budget, at))
            gc.collect()
    except InputsError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        result.interrupted = True
    result.notes = [note for note in (machine.slow_kernel() if target.device.type == "cpu" else None, busy) if note]
    return result


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    values = {name: value for name, value in vars(args).items() if name not in ("json", "plot", "run")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, targets: Targets = TARGETS) -> int:
    """Measures, prints and writes; the exit status, see `bench_options.STATUS`."""
    from sparge_compile.command import bench_view, view

    with view.progress() as announce, torch.no_grad():
        try:
            result = measure(parser, args, targets, announce)
        except KernelUnavailable as error:
            result = Result({}, _settings(args), None)
            result.unavailable = f"Nothing was measured: {error}\n{ASK_THE_DOCTOR}"
        except KeyboardInterrupt:  # while the kernel was built
            result = Result({}, _settings(args), None, interrupted=True)
    if args.json != "-":
        bench_view.show(result)
    try:
        view.write_json(result.to_json(), args.json)
        if args.plot and any(row.ratio is not None for row in result.rows):
            from sparge_compile.bench.plot import draw

            draw(result.to_json(), args.plot)
    except OSError as error:
        print(f"Not written: {error}", file=sys.stderr)
        return result.code or 1
    return result.code
