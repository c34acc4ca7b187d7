"""What the examples beside it share: dense and sparse in turn, how long each takes and how far apart they are."""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile import Report

RANDOM_WEIGHTS = (
    "Random weights: attention is flat and hardly a tile can be left out. What is gained, if anything, is a mask's or\n"
    "the kernel's own (INT8 products, on machines that have them). How sparse a trained model is, and how far off its\n"
    "outputs are, only a trained model can tell."
)


@dataclass(frozen=True)
class Comparison:
    """Outputs [..., features] of the last round, and seconds of every round. whole: of what ("model", "pipeline")."""

    dense: Tensor
    sparse: Tensor
    dense_seconds: list[float]
    sparse_seconds: list[float]
    whole: str = "model"

    @property
    def relative_l1(self) -> float:
        """sum |sparse - dense| / sum |dense|."""
        difference = (self.sparse.double() - self.dense.double()).abs().sum()
        return (difference / self.dense.double().abs().sum()).item()

    @property
    def least_cosine(self) -> float:
        """Of the output vectors (along the last dimension), the one least like its dense counterpart."""
        return F.cosine_similarity(self.sparse.double(), self.dense.double(), dim=-1).min().item()

    def __str__(self) -> str:
        dense, sparse = (statistics.median(seconds) for seconds in (self.dense_seconds, self.sparse_seconds))
        return (
            f"dense   {dense:9.3f} s\n"
            f"sparse  {sparse:9.3f} s   (whole {self.whole}, medians of {len(self.dense_seconds)}, in turn)\n"
            f"relative L1 of the outputs {self.relative_l1:.4f}, "
            f"least cosine of an output vector {self.least_cosine:.4f}\n"
            f"{verdict(self.dense_seconds, self.sparse_seconds, self.whole)}"
        )


def verdict(dense_seconds: list[float], sparse_seconds: list[float], whole: str = "model") -> str:
    """Which is faster, in words. The seconds of both are in the order of the rounds."""
    ratios = sorted(d / s for d, s in zip(dense_seconds, sparse_seconds, strict=True))
    middle = round(statistics.median(ratios), 2)
    ratio = f"{middle:.2f} times as fast as dense"
    if len(ratios) == 1:
        return f"whole {whole}: sparse was {ratio} in the one round; one is too few to tell"
    ratio += f" (between {ratios[0]:.2f} and {ratios[-1]:.2f})"
    if 0.98 <= middle <= 1.02:
        return f"whole {whole}: no difference, sparse is {ratio}"
    if middle < 0.98:
        return f"whole {whole}: sparse is NOT faster here, {ratio}; keep it dense at this size"
    if ratios[0] < 1.02:
        ratio += ": not in every round, so measure longer before relying on it"
    return f"whole {whole}: sparse is {ratio}"


def compare(dense: Callable[[], Tensor], sparse: Callable[[], Tensor], rounds: int, whole: str = "model") -> Comparison:
    """Calls both once, to compile and warm up, and then in turn, so that what else the machine does hits both.

    Args:
        dense, sparse: whole runs; they return tensors of one shape [..., features].
        rounds: how often each is measured; every other round begins with the sparse run.
        whole: what a run is one of.
    """
    print(f"one run each, which compiles what is not compiled, then {rounds} of each ...", flush=True)
    seconds: dict[Callable[[], Tensor], list[float]] = {dense: [], sparse: []}
    with torch.no_grad():
        outputs = {run: run() for run in seconds}
        for number in range(rounds):
            for run in (sparse, dense) if number % 2 else (dense, sparse):
                _wait()
                start = time.perf_counter()
                outputs[run] = run()
                _wait()
                seconds[run].append(time.perf_counter() - start)
    return Comparison(outputs[dense].cpu(), outputs[sparse].cpu(), seconds[dense], seconds[sparse], whole)


def _wait() -> None:
    """Until the GPU, if there is one, has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stop_if_all_dense(report: Report) -> None:
    """Ends the program, with the reasons, where dense and sparse would be the same graph."""
    if report.rewritten:
        return
    reasons = "".join(sorted({f"\n  {site.reason}" for site in report.sites}))
    raise SystemExit(
        f"No attention call was rewritten, so there is nothing to compare:{reasons}\n"
        "Where it is for their length: the default min_tokens is the length from which sparse attention pays on this\n"
        "machine, or is assumed to. Make the input longer, or pass --min-tokens N to rewrite calls of N tokens or more."
    )


def positive(text: str) -> int:
    """A type for argparse: 1, 2, ..."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{value}: must be 1 or more")
    return value


def multiple_of(unit: int) -> Callable[[str], int]:
    """A type for argparse: unit, 2 * unit, ..."""

    def number(text: str) -> int:
        value = int(text)
        if value < unit or value % unit:
            nearest = max(1, round(value / unit)) * unit
            raise ArgumentTypeError(f"{value}: must be a positive multiple of {unit}, such as {nearest}")
        return value

    return number
