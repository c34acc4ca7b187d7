"""The rates that a GPU reaches in plain copies and matrix products of torch, and what they allow attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparge_compile import dynamo
from sparge_compile.bench.problem import Problem
from sparge_compile.bench.rows import Row
from sparge_compile.bench.timing import Stopwatch

SIZE = 8192  # of the square matrices
COPY_BYTES = 2**30
WARM_UP, REPEATS = 3, 10


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes a second, read and written both counted. half, int8: operations a second of products in the dtype of
    the inputs and in INT8; None where torch has no such product.
    """

    copy: float
    half: float
    int8: float | None

    def words(self) -> str:
        int8 = "not available" if self.int8 is None else f"{self.int8 / 1e12:.0f} TOPS"
        return (
            f"Ceilings, measured here: copy {self.copy / 1e12:.2f} TB/s (read + written); {SIZE} x {SIZE} x {SIZE} "
            f"products of random numbers: torch.matmul {self.half / 1e12:.0f} TFLOPS, torch._int_mm {int8}."
        )

    def attention_seconds(self, row: Row, problem: Problem) -> float | None:
        """Of the two products of the row's tiles, or of moving Q, K, V and the output once where that is more."""
        operations = row.product_operations
        first = self.int8 if row.is_ours and problem.precision == "int8" else self.half
        if operations is None or first is None:
            return None
        moved = sum(x.numel() * x.element_size() for x in (*problem.inputs, problem.q))
        return max(operations / first + operations / self.half, moved / self.copy)

    def preparing_seconds(self, problem: Problem) -> float:
        """Of reading Q, K and V and writing the codes of Q and K once."""
        read = sum(x.numel() * x.element_size() for x in problem.inputs)
        written = problem.q.numel() + problem.k.numel() if problem.precision == "int8" else 0
        return (read + written) / self.copy

    def judge(self, row: Row, problem: Problem) -> None:
        """Fills in the shares of a timed row."""
        least = self.attention_seconds(row, problem)
        if row.milliseconds and least is not None:
            row.roofline_share = least * 1e3 / row.milliseconds
        if prepare := row.stages.get("prepare"):
            row.prepare_copy_share = self.preparing_seconds(problem) * 1e3 / prepare


def measure(
    device: torch.device,
    dtype: torch.dtype,
    stopwatch: Callable[[Callable[[], object]], Stopwatch],
    size: int = SIZE,
    copy_bytes: int = COPY_BYTES,
) -> Ceilings:
    def seconds(call: Callable[[], object]) -> float:
        watch = stopwatch(call)
        return statistics.median([watch().seconds for _ in range(WARM_UP + REPEATS)][WARM_UP:])

    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device).random_(0, 256)
    copied = torch.empty_like(source)
    copy = 2 * copy_bytes / seconds(lambda: copied.copy_(source))
    operations = 2 * size**3
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    half = operations / seconds(lambda: a @ b)
    a8, b8 = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    try:
        # Columns of b contiguous: what the units take.
        int8 = operations / seconds(lambda: dynamo.int8_matmul(a8, b8.T))
    except RuntimeError:
        int8 = None
    return Ceilings(copy, half, int8)
