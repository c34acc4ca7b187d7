"""The options of `python -m sparge_compile bench`, understood without torch: importing it takes seconds."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from pathlib import Path
from typing import Any

# What fits --budget-seconds; benchmarks/attention.py has defaults of its own, those of the published tables.
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
DTYPES = ("float32", "bfloat16", "float16")
ASK_THE_DOCTOR = "python -m sparge_compile doctor says what to do."
SHAPE = ("tokens", "heads", "kv_heads", "head_dim", "batch")
STATUS = {
    0: "at least one size was measured",
    1: "the kernel failed, is not accurate enough or cannot run, or a file could not be written",
    2: "wrong usage, nothing was measured",
    3: "nothing was measured, for want of time, memory or sound inputs",
    130: "interrupted: what was measured until then is shown",
}
"""What an exit status means."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "exit status:\n" + "\n".join(f"  {code:<4}{words}" for code, words in STATUS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=list(DEFAULTS), help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--tokens", type=_positive, nargs="+", help=f"several find the break-even; {_default('tokens')}"
    )
    parser.add_argument("--heads", type=_positive, help=_default("heads"))
    parser.add_argument("--kv-heads", type=_positive, help="key and value heads; default: --heads")
    parser.add_argument("--head-dim", type=_positive, help=_default("head_dim"))
    parser.add_argument("--batch", type=_positive, help="default: 1")
    parser.add_argument("--dtype", choices=DTYPES, help=f"{_default('dtype')}, or the file's")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--inputs", type=Path, metavar="FILE", help="your q, k and v (.safetensors or .pt), no shapes")
    parser.add_argument("--topk", type=_share, help="share of the tiles to keep, as Policy(topk=) has it")
    parser.add_argument("--density", type=_share, nargs="+", default=[1.0], help="further rows: exactly this share")
    parser.add_argument("--precision", choices=["int8", "none"], default="int8")
    parser.add_argument("--max-error", type=_number, default=0.05, help="gate: relative L1 to dense; default: .05")
    parser.add_argument("--min-row-cosine", type=_cosine, default=0.95, help="gate: of the worst row; default: .95")
    parser.add_argument("--peers", nargs="+", help="beside dense: on a GPU all by default, on a CPU none (flex: slow)")
    rounds = f"rounds in which each variant runs once, at most; {_default('repeats')}"
    parser.add_argument("--repeats", type=_positive, help=rounds)
    budget = "time to measure in, default: 45; fewer rounds where it is short, and sizes are left out that do not fit"
    parser.add_argument("--budget-seconds", type=_number, default=45.0, help=budget)
    parser.add_argument("--threads", type=_positive, help="default: torch's")
    parser.add_argument("--json", metavar="FILE", nargs="?", const="-", help="as JSON: to FILE, or printed instead")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speeds (needs matplotlib)")


def _default(name: str) -> str:
    cpu, gpu = (" ".join(map(str, value)) if isinstance(value, list) else value for value in _by_device(name))
    return f"default: {cpu}, on a GPU {gpu}"


def _by_device(name: str) -> list[Any]:
    return [DEFAULTS[device][name] for device in ("cpu", "cuda")]


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return number


def _real(text: str) -> float:
    """NaN, which is in no range, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _number(text: str) -> float:
    number = _real(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _share(text: str) -> float:
    number = _real(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number in (0, 1]")
    return number


def _cosine(text: str) -> float:
    number = _real(text)
    if not -1 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number in [-1, 1)")
    return number


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message on what can be told to be wrong without torch."""
    given = [f"--{name.replace('_', '-')}" for name in SHAPE if getattr(args, name) is not None]
    if args.inputs is not None and given:
        parser.error(f"--inputs brings its own shape; leave out {', '.join(given)}.")
    cpus = os.cpu_count() or 1
    if args.threads is not None and args.threads > cpus:  # OpenMP dies of very many
        parser.error(f"--threads {args.threads}: this machine has {cpus} CPUs; allowed: 1 to {cpus}.")
    if args.json not in (None, "-"):
        _check_writable(parser, "--json", Path(args.json))
    if args.plot is not None:
        _check_picture(parser, args.plot)


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in the device's defaults; exits with a message on options that do not go together."""
    import torch

    from sparge_kernels.checks import MAX_HEAD_DIM

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.threads = args.threads or torch.get_num_threads()
    defaults = DEFAULTS[args.device]
    if args.inputs is not None:
        args.repeats = args.repeats or defaults["repeats"]
        return
    for name, value in {**defaults, "batch": 1}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.tokens = sorted(set(args.tokens))
    args.kv_heads = args.kv_heads or args.heads
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}.")
    if args.head_dim > MAX_HEAD_DIM:
        parser.error(f"--head-dim {args.head_dim} is not supported; allowed: 1 to {MAX_HEAD_DIM}.")


def _check_picture(parser: argparse.ArgumentParser, path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install 'sparge-compile[plot]'")
    _check_writable(parser, "--plot", path)
    from matplotlib.backend_bases import FigureCanvasBase

    allowed = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in allowed:
        parser.error(f"--plot {path}: no picture has this ending; allowed: {', '.join(sorted(allowed))}.")


def _check_writable(parser: argparse.ArgumentParser, option: str, path: Path) -> None:
    """Refuses before minutes of measuring what could not be written after them."""
    try:
        if path.is_dir():
            parser.error(f"{option} {path} is a folder; name a file in it.")
        if not path.resolve().parent.is_dir():
            parser.error(f"{option} {path}: its folder is not there; make it first.")
        if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
            parser.error(f"{option} {path} cannot be written; choose a file that can.")
    except OSError as error:  # a name that no file can have
        parser.error(f"{option} {path}: {error.strerror}.")
