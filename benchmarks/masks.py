"""What masks are worth: a compiled attention call with each kind of mask, `backend="sparge"` against `"inductor"`.

Run from the repository root: python benchmarks/masks.py [--tokens 1024 ...] [--kinds padding ...] [--dtype bfloat16]
The workload is a smooth field under the default policy, with min_tokens=0. Every output is checked before it is timed;
"visible" is the share of the pairs that the mask leaves, "computed" the share of the visible tiles that the kernel
computes. The two run in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.bench import machine
from sparge_compile.bench.timing import rounds, wall_clock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import sparge_compile as sparge
from workloads import smooth_field

MAX_RELATIVE_L1 = 0.05
WINDOW = 1024


def _positions(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.arange(tokens)[:, None], torch.arange(tokens)


def padding(tokens: int) -> Tensor:
    """A quarter of the keys is padding, [1, 1, 1, tokens]."""
    return (torch.arange(tokens) < tokens * 3 // 4).view(1, 1, 1, -1)


def causal(tokens: int) -> Tensor:
    rows, columns = _positions(tokens)
    return columns <= rows


def window(tokens: int) -> Tensor:
    """Causal, and WINDOW keys back."""
    rows, columns = _positions(tokens)
    return (columns <= rows) & (columns > rows - WINDOW)


def documents(tokens: int) -> Tensor:
    """Four texts packed into one sequence, each causal."""
    rows, columns = _positions(tokens)
    return (columns <= rows) & (rows * 4 // tokens == columns * 4 // tokens)


def position_bias(tokens: int) -> Tensor:
    """A bias that falls with the distance (ALiBi), [1, 8, tokens, tokens], fp32."""
    rows, columns = _positions(tokens)
    slopes = 2.0 ** -torch.arange(1, 9).view(1, 8, 1, 1)
    return -(rows - columns).abs() * slopes


def relative_bias(tokens: int) -> Tensor:
    """T5's bias: 8 numbers, one a head, for each of 32 ranges of distance; [1, 8, tokens, tokens], heads innermost."""
    rows, columns = _positions(tokens)
    distance = columns - rows
    far = 8 + ((distance.abs().clamp(min=1) / 8).log2() * 2).long().clamp(max=7)
    ranges = torch.where(distance.abs() < 8, distance.abs(), far) + 16 * (distance > 0)
    table = 2 * torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    return table[ranges].permute(2, 0, 1)[None]


KINDS: dict[str, Callable[[int], Tensor]] = {
    "padding": padding,
    "causal": causal,
    "window": window,
    "documents": documents,
    "position-bias": position_bias,
    "relative-bias": relative_bias,
}


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def compare(kind: str, tokens: int, dtype: torch.dtype, repeats: int) -> str:
    """One line of the table."""
    rows = tokens // 128
    height = next(h for h in (8, 4, 2, 1) if rows % h == 0)
    mask = KINDS[kind](tokens)
    field = smooth_field((rows // height, height, 128), heads=8, head_dim=64)
    inputs = [*(x.to(dtype) for x in field), mask if mask.dtype == torch.bool else mask.to(dtype)]
    policy = sparge.Policy(min_tokens=0)
    (site,) = sparge.explain(attend, *inputs, policy=policy).sites
    if not site.rewritten:
        raise SystemExit(f"{kind}: not rewritten ({site.reason})")
    torch._dynamo.reset()
    sparse = torch.compile(attend, backend="sparge", dynamic=False, options={"sparge.min_tokens": 0})
    dense = torch.compile(attend, backend="inductor", dynamic=False)
    expected = dense(*inputs)
    error = float((sparse(*inputs) - expected).float().abs().sum() / expected.float().abs().sum())
    if not error < MAX_RELATIVE_L1:
        raise SystemExit(f"{kind}, {tokens} tokens: relative L1 {error:.4f} is not below {MAX_RELATIVE_L1}; not timed.")
    watches = {"dense": wall_clock(lambda: dense(*inputs)), "sparse": wall_clock(lambda: sparse(*inputs))}
    measured = rounds(watches, repeats)
    milliseconds = {name: statistics.median(times[name].seconds for times in measured) * 1e3 for name in watches}
    ratio = statistics.median(times["dense"].seconds / times["sparse"].seconds for times in measured)
    visible = 1.0 if mask.dtype != torch.bool else float(mask.float().mean())
    return (
        f"{kind:>14} {tokens:7d} {visible:8.3f} {site.density:9.3f} {error:8.4f} {milliseconds['dense']:10.1f} "
        f"{milliseconds['sparse']:10.1f} {ratio:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("; ".join(f"{name}: {value}" for name, value in machine.describe(args.threads).items()) + ".\n")
    print(
        f"{'mask':>14} {'tokens':>7} {'visible':>8} {'computed':>9} {'rel. L1':>8} {'dense ms':>10} {'sparse ms':>10} "
        f"{'speed-up':>8}"
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for tokens in args.tokens:
            for kind in args.kinds:
                print(compare(kind, tokens, getattr(torch, args.dtype), args.repeats), flush=True)


if __name__ == "__main__":
    main()
