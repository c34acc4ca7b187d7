"""The attention kernel beside what users would otherwise pick, on the same inputs: accuracy first, then time.

Run from the repository root:

    python benchmarks/attention.py --device cpu [--tokens 8192 16384] [--densities 1 .5 .25 .1] [--causal] [--roofline]

It prints Markdown: the machine, one table, and how to read it. A number whose check fails is not printed, and the exit
status is 1. Peers are registered in peers.py, the checks are in accuracy.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
import roofline
import torch
from peers import DENSE, OURS, PEERS, optional_peers
from problem import ROW, smooth_problem
from rows import Row, Shape, table_head, table_line

from sparge_kernels import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL_TOKENS, SMALL_HEADS = 2048, 2  # what the reference computes in a second or two

LEGEND = f"""
Every variant of a block (one shape, one density) runs in turn within each repeat; times are medians. Baseline: the
faster dense variant. Speed: median over the repeats of baseline time / time, with its smallest and largest value.
Effective GFLOPS: operations of the whole dense problem, halved for causal, over the time. Dense variants compute every
tile. `{OURS}` at "1 tile a row" (and the diagonal, if causal) bounds from above what predicting and quantizing take.
`flex` is compiled FlexAttention over the tiles that `{OURS}` keeps; choosing them is not in its time.
Extra memory: what one call of `{OURS}` takes at its peak beyond inputs and output, to half a megabyte.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1], help="tiles to keep")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--precision", choices=["int8", "none"], default="int8")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="+", help="default: all; dense is always measured, it is the baseline")
    parser.add_argument("--roofline", action="store_true", help="also time torch's brgemm (needs g++ and ninja)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message on arguments that make no benchmark; fills in --peers."""
    if args.device not in PEERS:
        parser.error(f"--device {args.device}: nothing is registered for it in peers.py; there is {', '.join(PEERS)}.")
    allowed = optional_peers(args.device)
    args.peers = allowed if args.peers is None else sorted({DENSE, *args.peers})
    if unknown := set(args.peers) - set(allowed):
        parser.error(f"--peers {' '.join(sorted(unknown))}: no such peer; allowed: {', '.join(allowed)}.")
    for tokens in args.tokens:
        if tokens <= 0 or tokens % ROW:
            parser.error(f"--tokens {tokens} is not a multiple of {ROW}.")
    for density in args.densities:
        if not 0 < density <= 1:
            parser.error(f"--densities {density} is not in (0, 1].")
    if args.heads < 1 or args.head_dim < 1 or args.repeats < 1 or args.threads < 1:
        parser.error("--heads, --head-dim, --repeats and --threads are 1 or more.")
    if reason := ops.unavailable(torch.device(args.device)):
        parser.error(f"the kernel cannot run: {reason}")


def measure_shape(args: argparse.Namespace, tokens: int) -> tuple[Shape, list[Row]]:
    """All rows of one number of tokens, each block printed when it is done."""
    options: dict[str, Any] = {
        "head_dim": args.head_dim,
        "is_causal": args.causal,
        "precision": args.precision,
        "dtype": DTYPES[args.dtype],
    }
    shape = Shape(
        peers={name: peer for name, peer in PEERS[args.device].items() if name.split()[0] in (OURS, *args.peers)},
        problem=smooth_problem(tokens, args.heads, **options),
        small=smooth_problem(min(tokens, SMALL_TOKENS), min(args.heads, SMALL_HEADS), **options),
        threads=args.threads,
        repeats=args.repeats,
    )
    rows = []
    for density in (*args.densities, None):
        block = shape.measure(density)
        print("\n".join(map(table_line, block)), flush=True)
        rows += block
    return shape, rows


def roofline_lines(
    args: argparse.Namespace, measured: list[tuple[Shape, list[Row]]]
) -> tuple[list[str], dict[str, Any]]:
    """What the products alone would allow, in words and as data; or why that is not known."""
    if args.precision != "int8":
        return ["Roofline: not measured (it is that of INT8 and BF16 products; --precision none has neither)."], {}
    try:
        rates = roofline.measure(args.head_dim)
    except roofline.Unavailable as error:
        return [f"Roofline: not measured ({error})."], {}
    data: dict[str, Any] = {"int8_gops": rates.int8 / 1e9, "bf16_gflops": rates.bf16 / 1e9, "share": {}}
    lines = [
        f"Roofline: torch's brgemm on one core, operands in cache: {rates.int8 / 1e9:.0f} GOPS for INT8 (128 x 64 x "
        f"{args.head_dim}), {rates.bf16 / 1e9:.0f} GFLOPS for BF16 (128 x {args.head_dim} x 64)."
    ]
    for shape, rows in measured:
        for row in rows:
            if row.variant.startswith(OURS) and row.density_asked == 1 and row.milliseconds:
                products = roofline.seconds_of_products(shape.problem, rates, args.threads) * 1e3
                data["share"][row.tokens] = products / row.milliseconds
                lines.append(
                    f"{row.tokens} tokens, density 1: at these rates the two products alone would take "
                    f"{products:.1f} ms (threads: {args.threads}), the whole call takes {row.milliseconds:.1f} ms: "
                    f"{products / row.milliseconds:.0%} of the roofline."
                )
    return lines, data


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    facts = machine.describe(args.threads)
    print(f"{'; '.join(f'{name}: {value}' for name, value in facts.items())}.\n")
    print(f"`{shlex.join(['python', 'benchmarks/attention.py', *sys.argv[1:]])}`\n")
    causal = "causal" if args.causal else "not causal"
    print(f"Smooth field, [1, {args.heads}, tokens, {args.head_dim}] in {args.dtype}, {causal}.\n")
    print(table_head(), flush=True)
    with torch.no_grad():
        measured = [measure_shape(args, tokens) for tokens in args.tokens]
        print(LEGEND)
        lines, data = roofline_lines(args, measured) if args.roofline else ([], {})
    print("\n\n".join(lines))
    rows = [row for _, some in measured for row in some]
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        content = {"machine": facts, "settings": settings, "rows": [asdict(row) for row in rows], "roofline": data}
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
