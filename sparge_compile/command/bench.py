"""`python -m sparge_compile bench`: the user's shapes, dense peers beside this kernel, and a verdict in words."""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparge_compile.bench import machine, verdict
from sparge_compile.bench.budget import SETTING_UP, Budget
from sparge_compile.bench.inputs import InputsError, load_problem
from sparge_compile.bench.peers import DENSE, OURS, Peer, dense, optional_peers
from sparge_compile.bench.problem import DTYPES, Choice, Problem, dense_flops, of_policy, share, smooth_problem
from sparge_compile.bench.rows import Row, Shape, in_words
from sparge_compile.bench.target import Target
from sparge_compile.bench.targets import TARGETS, KernelUnavailable, Targets, find
from sparge_compile.bench.verdict import Verdict
from sparge_compile.command.bench_options import complete
from sparge_compile.policy import Policy

SETTING_UP_ON_CPU = 5e10  # as SETTING_UP
SMALL_TOKENS, SMALL_HEADS = 512, 2  # what the reference computes in a fraction of a second
SMOOTH = (
    "Measured on a synthetic smooth field. How many tiles may be skipped depends on the numbers: "
    "--inputs FILE measures your own q, k and v."
)


@dataclass
class Result:
    """What was measured, and what it means. code: the exit status."""

    facts: dict[str, str]
    settings: dict[str, Any]
    rows: list[Row]
    verdicts: list[Verdict]
    words: list[str]
    code: int

    def to_json(self) -> dict[str, Any]:
        return {
            "version": 1,
            "machine": self.facts,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "verdicts": [asdict(one) for one in self.verdicts],
            "words": self.words,
            "exit_code": self.code,
        }


def choose_peers(
    parser: argparse.ArgumentParser, target: Target, asked: Sequence[str] | None, max_error: float
) -> dict[str, Peer]:
    """Ours, the dense ones and those asked for. On a CPU nobody asks for flex: it compiles 10 s a shape."""
    allowed = optional_peers(target.peers)
    if unknown := set(asked or ()) - set(allowed):
        parser.error(f"--peers {' '.join(sorted(unknown))}: no such peer; allowed: {', '.join(allowed)}.")
    wanted = {OURS, DENSE, *((allowed if target.device.type == "cuda" else ()) if asked is None else asked)}
    peers = {name: peer for name, peer in target.peers.items() if name.split()[0] in wanted}
    return {**peers, OURS: replace(peers[OURS], exact_limit=max_error)}


def with_dense_types(peers: dict[str, Peer], dtype: torch.dtype) -> dict[str, Peer]:
    """The same with dense attention in the call's own dtype, and in bf16 where the call is fp32."""
    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    limits = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
    wanted = {dtype, torch.bfloat16} if dtype == torch.float32 else {dtype}
    if "dense default" in peers:  # that is the one in the call's dtype
        wanted.discard(dtype)
    added = {f"dense {types[one]}": Peer(dense(one), False, limits[one]) for one in wanted}
    return {**{name: peer for name, peer in added.items() if name not in peers}, **peers}


Maker = Callable[[], Problem]


def problems(args: argparse.Namespace, device: torch.device) -> list[tuple[int, Maker]]:
    """(tokens, what makes the problem) for each size, so that only one is in memory; 0 tokens: the file knows."""
    common: dict[str, Any] = {"is_causal": args.causal, "precision": args.precision, "device": device}
    common["dtype"] = None if args.dtype is None else DTYPES[args.dtype]
    if args.inputs is not None:
        return [(0, functools.partial(load_problem, args.inputs, **common))]
    common.update(heads=args.heads, head_dim=args.head_dim, kv_heads=args.kv_heads, batch=args.batch)
    return [(tokens, functools.partial(smooth_problem, tokens, **common)) for tokens in args.tokens]


def main_choice(args: argparse.Namespace) -> Choice:
    """What the verdict is on: the default thresholds, or the user's topk."""
    policy = Policy(topk=args.topk)
    return of_policy("default" if args.topk is None else f"topk {args.topk:g}", policy, args.causal, args.max_error)


def measure_size(
    args: argparse.Namespace, target: Target, size: tuple[int, Maker], deadline: float | None, only_size: bool
) -> tuple[list[Row], Verdict]:
    """The rows of one size and what they mean. What goes wrong is in the rows.

    Raises:
        InputsError: the user's file is no problem.
    """
    (tokens, make), choice = size, main_choice(args)
    kept, problem = None, None
    try:
        if deadline is None:
            raise TimeoutError("no time left, raise --budget-seconds")
        problem = make()
        kept = verdict.left_dense(problem)
        shape = Shape(
            replace(target, peers=with_dense_types(dict(target.peers), problem.dtype)),
            problem,
            problem.part(SMALL_TOKENS, SMALL_HEADS),
            args.repeats,
            deadline,
            ours_or_none=True,
        )
        rows = shape.measure([choice, *(share(density) for density in args.density)])
    except InputsError:
        raise
    except Exception as error:  # whatever a device may raise
        rows = [without_times(args, tokens, problem, error)]
    return rows, verdict.judge(rows, choice.name, kept, only_size)


def without_times(args: argparse.Namespace, tokens: int, problem: Problem | None, error: Exception) -> Row:
    """The row of a size at which something raised: want of memory or of time is no failure of the kernel."""
    tokens = problem.q.shape[2] if problem else tokens
    row = Row(tokens, args.head_dim or 0, args.causal, None, f"{OURS} {args.precision}", main_choice(args).name)
    scarce = isinstance(error, (TimeoutError, torch.OutOfMemoryError)) or problem is None
    return replace(row, note=str(error) if isinstance(error, TimeoutError) else in_words(error), failed=not scarce)


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
    sizes = problems(args, target.device)[::-1]  # from the longest, which says most
    work = [dense_flops(tokens, args.heads, args.head_dim, args.causal) for tokens in args.tokens or []] or [1.0]
    setting_up = SETTING_UP if target.device.type == "cuda" else SETTING_UP_ON_CPU
    budget = Budget(args.budget_seconds, work[::-1], setting_up=setting_up)
    result = Result(target.facts(args.threads), _settings(args), [], [], [], 0)
    for at, size in enumerate(sizes):
        announce(f"size {at + 1} of {len(sizes)}: checking, then timing")
        try:
            rows, one = measure_size(args, target, size, budget.deadline(at), len(sizes) == 1)
        except InputsError as error:
            parser.error(str(error))
        result.rows[:0] = rows
        result.verdicts.insert(0, one)
        gc.collect()
    result.words = conclude(args, result.verdicts, target.device, busy)
    result.code = int(any(one.outcome == "gate failed" for one in result.verdicts))
    return result


def conclude(
    args: argparse.Namespace, verdicts: Sequence[Verdict], device: torch.device, busy: str | None
) -> list[str]:
    """The lines after the table."""
    words = [one.words for one in verdicts]
    if len(verdicts) > 1:
        words.append(verdict.break_even(verdicts))
    words.append(verdict.default_minimum(device, args.precision))
    if args.inputs is None:
        words.append(SMOOTH)
    if busy is not None:
        words.append(busy)
    return [line for line in words if line]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    values = {name: value for name, value in vars(args).items() if name not in ("json", "plot", "run")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def run(parser: argparse.ArgumentParser, args: argparse.Namespace, targets: Targets = TARGETS) -> int:
    """Measures, prints and writes; the exit status: 0, or 1 where the accuracy gate failed or there is no kernel."""
    from sparge_compile.command import view

    with view.progress() as announce, torch.no_grad():
        try:
            result = measure(parser, args, targets, announce)
        except KernelUnavailable as error:
            words = [f"Nothing was measured: {error}", "python -m sparge_compile doctor says what to do."]
            result = Result({}, _settings(args), [], [], words, 1)
    content = result.to_json()
    if args.json != "-":
        view.show_bench(result)
    view.write_json(content, args.json)
    if args.plot and result.rows:
        from sparge_compile.bench.plot import draw

        draw(content, args.plot)
    return result.code
