"""The benchmark's command line."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from sparge_compile.bench.peers import DENSE, optional_peers
from sparge_compile.bench.problem import DTYPES, ROW
from sparge_compile.bench.target import Target
from sparge_compile.bench.targets import KernelUnavailable, Targets, find

CAUSAL = {"no": (False,), "yes": (True,), "both": (False, True)}


def parse(argv: Sequence[str] | None, targets: Targets, description: str | None) -> tuple[argparse.Namespace, Target]:
    """The options and the device they name. Exits with a message on arguments that make no benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help=f"one of {', '.join(targets)}")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--head-dim", type=int, nargs="+")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1], help="tiles to keep")
    parser.add_argument("--causal", choices=list(CAUSAL), nargs="?", const="yes")
    parser.add_argument("--precision", choices=["int8", "none"], default="int8")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, help="rounds in which each variant runs once, at most")
    parser.add_argument("--budget-seconds", type=float, help="time for all shapes; fewer repeats where it is short")
    parser.add_argument("--peers", nargs="+", help="default: all; dense is always measured, it is the baseline")
    parser.add_argument("--roofline", action="store_true", help="on a CPU: also time torch's brgemm (g++ and ninja)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the speeds (needs matplotlib)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    try:
        target = find(args.device, targets)
    except (ValueError, KernelUnavailable) as error:
        parser.error(str(error))
    for option, value in target.defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    check(parser, args, target)
    return args, target


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, target: Target) -> None:
    """Exits with a message on a wrong value; fills in --peers."""
    allowed = optional_peers(target.peers)
    args.peers = allowed if args.peers is None else sorted({DENSE, *args.peers})
    if unknown := set(args.peers) - set(allowed):
        parser.error(f"--peers {' '.join(sorted(unknown))}: no such peer; allowed: {', '.join(allowed)}.")
    for tokens in args.tokens:
        if tokens <= 0 or tokens % ROW:
            parser.error(f"--tokens {tokens} is not a multiple of {ROW}.")
    for density in args.densities:
        if not 0 < density <= 1:
            parser.error(f"--densities {density} is not in (0, 1].")
    if min(*args.head_dim, args.heads, args.repeats, args.threads) < 1:
        parser.error("--heads, --head-dim, --repeats and --threads are 1 or more.")
    if args.budget_seconds is not None and not args.budget_seconds > 0:
        parser.error(f"--budget-seconds {args.budget_seconds} is not above 0.")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install 'sparge-compile[plot]'")
