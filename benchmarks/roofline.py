"""The rate at which one core multiplies tiles with torch's brgemm, and what it allows a kernel of those products.

Needs a C++ compiler and the program ninja; `measure` raises `Unavailable` with the reason where it cannot run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from sparge_compile.bench.rows import Row
from sparge_kernels.thresholds import K_TILE, Q_TILE

CALLS = 100_000
REPEATS = 5


class Unavailable(RuntimeError):
    """The rates cannot be measured; the message says why."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of one thread: u8 x s8 -> s32 for Q K^T, bf16 x bf16 -> fp32 for P V."""

    int8: float
    bf16: float


def measure(head_dim: int) -> Rates:
    """The rates for tiles of 128 queries and 64 keys, all operands in cache; every product is checked first."""
    if head_dim % 4:
        raise Unavailable(f"head_dim {head_dim} is not a multiple of 4")
    operators = _load()
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    q, k = integers(0, 256, Q_TILE, head_dim), integers(-127, 128, head_dim, K_TILE)
    weights, v = integers(0, 8, Q_TILE, K_TILE), integers(-8, 8, K_TILE, head_dim)
    bf16 = torch.bfloat16
    return Rates(
        int8=_rate(operators.int8, q.to(torch.uint8), k.to(torch.int8), torch.int32, 4),
        bf16=_rate(operators.bf16, weights.to(bf16), v.to(bf16), torch.float32, 2),
    )


def seconds_of_products(operations: float, rates: Rates, threads: int) -> float:
    """What two products of so many operations each take if each of `threads` cores keeps the rates of one."""
    return (operations / rates.int8 + operations / rates.bf16) / threads


def report(
    rows: Sequence[Row], *, head_dims: Sequence[int], precision: str, threads: int
) -> tuple[list[str], dict[str, Any]]:
    """What the products alone would allow, in words and as data; or why that is not known."""
    if precision != "int8":
        return ["Roofline: not measured (it is that of INT8 and BF16 products; --precision none has neither)."], {}
    lines, data = [], {}
    for head_dim in head_dims:
        try:
            rates = measure(head_dim)
        except Unavailable as error:
            return [f"Roofline: not measured ({error})."], {}
        share = data.setdefault("share", {})
        data.update(int8_gops=rates.int8 / 1e9, bf16_gflops=rates.bf16 / 1e9)
        lines.append(
            f"Roofline: torch's brgemm on one core, operands in cache: {rates.int8 / 1e9:.0f} GOPS for INT8 "
            f"(128 x 64 x {head_dim}), {rates.bf16 / 1e9:.0f} GFLOPS for BF16 (128 x {head_dim} x 64)."
        )
        for row in rows:
            if row.is_ours and row.density_asked == 1 and row.milliseconds and row.head_dim == head_dim:
                assert row.product_operations is not None
                products = seconds_of_products(row.product_operations, rates, threads) * 1e3
                share[row.tokens] = products / row.milliseconds
                lines.append(
                    f"{row.tokens} tokens, density 1: at these rates the two products alone would take "
                    f"{products:.1f} ms (threads: {threads}), the whole call takes {row.milliseconds:.1f} ms: "
                    f"{products / row.milliseconds:.0%} of the roofline."
                )
    return lines, data


def _rate(multiply: Callable[..., float], a: Tensor, b: Tensor, out_dtype: torch.dtype, interleaved: int) -> float:
    """Operations a second of a [M, K] x b [K, N]. The numbers are small integers: the product is exact."""
    out = torch.full((a.shape[0], b.shape[1]), -1, dtype=out_dtype)
    # VNNI order: `interleaved` consecutive k of a column lie together, [K / i, N, i].
    packed = b.reshape(-1, interleaved, b.shape[1]).transpose(1, 2).contiguous()
    try:
        multiply(a, packed, out, 1)
    except RuntimeError as error:
        raise Unavailable(f"no brgemm of {a.dtype} on this CPU: {str(error).splitlines()[0]}") from error
    if not torch.equal(out.double(), a.double() @ b.double()):
        raise Unavailable(f"brgemm of {a.dtype} x {b.dtype} gives wrong numbers on this CPU")
    times = [multiply(a, packed, out, CALLS) for _ in range(REPEATS)]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] * CALLS / statistics.median(times)


def _load() -> Any:
    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(compiler):
        raise Unavailable(f"there is no C++ compiler {compiler!r}")
    # The environment's ninja need not be on PATH when its Python is called by name.
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    source = Path(__file__).with_name("brgemm_roofline.cpp")
    try:
        # A folder of its own: in the shared one, the lock of a build that was killed is waited for without end.
        with tempfile.TemporaryDirectory() as folder:
            cpp_extension.load(
                "sparge_roofline",
                [str(source)],
                extra_cflags=["-O3"],
                build_directory=folder,
                is_python_module=False,
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the C++ part cannot be built: {str(error).splitlines()[0]}") from error
    finally:
        os.environ["PATH"] = path
    return torch.ops.sparge_roofline
