"""The options of `python -m sparge_compile bench`."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch

from sparge_compile.bench.problem import DTYPES
from sparge_compile.bench.targets import TARGETS
from sparge_kernels.checks import MAX_HEAD_DIM

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"tokens": [1024, 2048, 4096, 8192], "heads": 8, "head_dim": 64, "dtype": "float32", "repeats": 15},
    "cuda": {
        "tokens": [4096, 8192, 16384, 32768],
        "heads": 32,
        "head_dim": 128,
        "dtype": "bfloat16",
        "repeats": 20,
    },
}
SHAPE = ("tokens", "heads", "kv_heads", "head_dim", "batch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=list(TARGETS), default=None, help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--tokens",
        type=_positive,
        nargs="+",
        help="several find the break-even; default: 1024 to 8192, on a GPU 4096 to 32768",
    )
    parser.add_argument("--heads", type=_positive)
    parser.add_argument("--kv-heads", type=_positive, help="key and value heads; default: --heads")
    parser.add_argument("--head-dim", type=_positive)
    parser.add_argument("--batch", type=_positive)
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--inputs", type=Path, metavar="FILE", help="your q, k and v (.safetensors or .pt), no shapes")
    parser.add_argument(
        "--topk", type=_share, help="share of the tiles to keep, as Policy(topk=) has it; else defaults"
    )
    parser.add_argument("--density", type=_share, nargs="+", default=[1.0], help="further rows: exactly this share")
    parser.add_argument("--precision", choices=["int8", "none"], default="int8")
    parser.add_argument("--max-error", type=_number, default=0.05, help="gate: relative L1 to dense (default .05)")
    parser.add_argument("--peers", nargs="+", help="beside dense: on a GPU all by default, on a CPU none (flex: slow)")
    parser.add_argument("--repeats", type=_positive, help="rounds in which each variant runs once, at most")
    parser.add_argument("--budget-seconds", type=_number, default=45.0, help="fewer repeats where it is short (45)")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="as JSON: to FILE, or printed instead")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speeds (needs matplotlib)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _number(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return number


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in the device's defaults; exits with a message on options that do not go together."""
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install 'sparge-compile[plot]'")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path and not Path(path).resolve().parent.is_dir():
            parser.error(f"{option} {path}: its folder is not there; make it first.")
    if args.inputs is not None:
        given = [f"--{name.replace('_', '-')}" for name in SHAPE if getattr(args, name) is not None]
        if given:
            parser.error(f"--inputs brings its own shape; leave out {', '.join(given)}.")
        args.repeats = args.repeats or DEFAULTS[args.device]["repeats"]
        return
    for name, value in {**DEFAULTS[args.device], "batch": 1}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.tokens = sorted(set(args.tokens))
    args.kv_heads = args.kv_heads or args.heads
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}.")
    if args.head_dim > MAX_HEAD_DIM:
        parser.error(f"--head-dim {args.head_dim} is not supported; allowed: 1 to {MAX_HEAD_DIM}.")
