"""From what length on does sparse attention pay on this CPU? Dense SDPA against `sparge::attention`, paired.

Run from the repository root: python benchmarks/cpu_breakeven.py [--lengths 1024 4096] [--heads 8] [--causal]
The workload is a smooth field at the default thresholds; every output is checked before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from sparge_compile.rules import rule_for
from sparge_kernels import ops  # noqa: F401 - registers the operator
from sparge_kernels.thresholds import pack
from workloads import smooth_field

MAX_RELATIVE_L1 = 0.05


def seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(tokens: int, heads: int, head_dim: int, repeats: int, precision: str, is_causal: bool) -> str:
    """One line of the table for `tokens` queries and keys."""
    rows = tokens // 128
    height = next(h for h in (8, 4, 2, 1) if rows % h == 0)
    q, k, v = smooth_field((rows // height, height, 128), heads=heads, head_dim=head_dim)
    rule = rule_for("auto", is_causal)
    options = {
        "thresholds": pack([rule.thresholds]),
        "predictor": rule.predictor,
        "precision": precision,
        "is_causal": is_causal,
    }
    output, density, pv_skipped = torch.ops.sparge.attention_with_stats.default(q, k, v, **options)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    error = float((output - expected).abs().sum() / expected.abs().sum())
    if not error < MAX_RELATIVE_L1:
        raise SystemExit(f"{tokens} tokens: relative L1 {error:.4f} is not below {MAX_RELATIVE_L1}; not timed.")
    pairs = [
        (
            seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)),
            seconds(lambda: torch.ops.sparge.attention.default(q, k, v, **options)),
        )
        for _ in range(repeats)
    ]
    dense, sparse = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(d / s for d, s in pairs)
    return (
        f"{tokens:7d} {dense * 1e3:10.1f} {sparse * 1e3:10.1f} {float(density.mean()):8.3f} "
        f"{float(pv_skipped.mean()):8.3f} {error:8.4f} {ratio:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["int8", "none"], default="int8")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, [1, {args.heads}, tokens, {args.head_dim}] fp32")
    print(
        f"{'tokens':>7} {'dense ms':>10} {'sparse ms':>10} {'density':>8} {'skipped':>8} {'rel. L1':>8} {'speed-up':>8}"
    )
    with torch.no_grad():
        for tokens in args.lengths:
            print(compare(tokens, args.heads, args.head_dim, args.repeats, args.precision, args.causal), flush=True)


if __name__ == "__main__":
    main()
