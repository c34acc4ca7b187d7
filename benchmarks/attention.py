"""The attention kernel beside what users would otherwise pick, on the same inputs: accuracy first, then time.

Run from the repository root:

    python benchmarks/attention.py --device cpu [--tokens 8192 16384] [--densities 1 .5 .25 .1] [--causal] [--roofline]
    python benchmarks/attention.py --device cuda [--tokens 32768 131072] [--head-dim 128] [--json FILE] [--plot FILE]

It prints Markdown: the machine, a table for each head dim, causal or not, each row when it is there, and how to read
it; --json is written after each block. A number whose check fails is not printed, and the exit status is 1. Peers are
registered in peers.py and gpu_peers.py, the checks are in accuracy.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import options
import roofline
import torch

from sparge_compile.bench import cpu_target, gpu_target, plot
from sparge_compile.bench.budget import Budget
from sparge_compile.bench.peers import OURS
from sparge_compile.bench.problem import DTYPES, ONE_TILE, dense_flops, share, smooth_problem
from sparge_compile.bench.rows import Row, Shape, in_words
from sparge_compile.bench.table import table_head, table_line
from sparge_compile.bench.target import Target
from sparge_compile.bench.targets import Targets
from sparge_kernels.records import is_out_of_memory


def cpu() -> Target:
    return replace(cpu_target.target(), closing=rooflines)


def rooflines(args: argparse.Namespace, rows: Sequence[Row]) -> tuple[list[str], dict[str, Any]]:
    if not args.roofline:
        return [], {}
    return roofline.report(rows, head_dims=args.head_dim, precision=args.precision, threads=args.threads)


TARGETS: Targets = {"cpu": cpu, "cuda": gpu_target.target}
SMALL_TOKENS, SMALL_HEADS = 2048, 2  # what the reference computes in a second or two


@dataclass(frozen=True)
class Size:
    head_dim: int
    is_causal: bool
    tokens: int

    def work(self, heads: int) -> float:
        return dense_flops(self.tokens, heads, self.head_dim, self.is_causal)


def measure(args: argparse.Namespace, target: Target, size: Size, deadline: float | None) -> Iterator[list[Row]]:
    """The rows of one size, each block when it is done; a row that says why where there are none."""
    try:
        if deadline is None:
            raise TimeoutError("nothing is left of --budget-seconds")
        shape = make_shape(args, target, size, deadline)
        choices = [share(density) for density in args.densities]
        for block in [choices] if target.one_block else [[one] for one in (*choices, ONE_TILE)]:
            yield shape.measure(block)
    except Exception as error:  # whatever a device may raise; the other sizes are measured all the same
        skipped = isinstance(error, TimeoutError) or is_out_of_memory(error)
        if not skipped:
            traceback.print_exc()
        first = share(args.densities[0])
        row = Row(size.tokens, size.head_dim, size.is_causal, first.density, f"{OURS} {args.precision}", first.name)
        row.trouble, row.note = "not measured" if skipped else "failed", in_words(error)
        yield [row]


def make_shape(args: argparse.Namespace, target: Target, size: Size, deadline: float) -> Shape:
    problem = smooth_problem(
        size.tokens,
        args.heads,
        size.head_dim,
        is_causal=size.is_causal,
        precision=args.precision,
        dtype=DTYPES[args.dtype],
        device=target.device,
    )
    chosen = {name: peer for name, peer in target.peers.items() if name.split()[0] in (OURS, *args.peers)}
    return Shape(
        target=replace(target, peers=chosen),
        problem=problem,
        small=problem.part(SMALL_TOKENS, SMALL_HEADS),
        repeats=args.repeats,
        deadline=deadline,
    )


def write_json(
    args: argparse.Namespace, facts: Mapping[str, str], rows: Sequence[Row], roofline: Mapping[str, Any]
) -> dict[str, Any]:
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "plot")}
    content = {"machine": facts, "settings": settings, "rows": [asdict(row) for row in rows], "roofline": roofline}
    if args.json:
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    return content


def run(args: argparse.Namespace, target: Target, argv: Sequence[str]) -> list[Row]:
    """Everything the command prints and writes."""
    seconds = math.inf if args.budget_seconds is None else args.budget_seconds
    sizes = [
        Size(head_dim, is_causal, tokens)
        for head_dim in args.head_dim
        for is_causal in options.CAUSAL[args.causal]
        for tokens in args.tokens
    ]
    budget = Budget(seconds, [size.work(args.heads) for size in sizes])
    facts = target.facts(args.threads)
    print(f"{'; '.join(f'{name}: {value}' for name, value in facts.items())}.\n")
    print(f"`{shlex.join(['python', 'benchmarks/attention.py', *argv])}`\n")
    roofline: dict[str, Any] = {}
    if target.ceilings is not None:
        ceilings = target.ceilings(DTYPES[args.dtype])
        target = replace(target, judge=ceilings.judge)
        roofline = asdict(ceilings)
        print(f"{ceilings.words()}\n")
    rows: list[Row] = []
    for at, size in enumerate(sizes):
        if at % len(args.tokens) == 0:
            causal = "causal" if size.is_causal else "not causal"
            print("\n" if at else "", end="")
            print(f"Smooth field, [1, {args.heads}, tokens, {size.head_dim}] in {args.dtype}, {causal}.\n")
            print(table_head(target.columns), flush=True)
        for block in measure(args, target, size, budget.deadline(at)):
            print("\n".join(table_line(target.columns, row) for row in block), flush=True)
            rows += block
            write_json(args, facts, rows, roofline)
        gc.collect()
        if target.device.type == "cuda":
            torch.cuda.empty_cache()
    print(target.legend)
    lines, data = target.closing(args, rows)
    print("\n\n".join(lines))
    content = write_json(args, {**facts, **target.facts_after()}, rows, {**roofline, **data})
    if args.plot:
        plot.draw(content, args.plot)
    return rows


def main(argv: Sequence[str] | None = None, targets: Targets = TARGETS) -> None:
    args, target = options.parse(argv, targets, __doc__)
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        rows = run(args, target, sys.argv[1:] if argv is None else argv)
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
