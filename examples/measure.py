"""What the examples beside it share: dense and sparse in turn, how long each takes and how far apart they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RANDOM_WEIGHTS = (
    "Random weights: attention is flat and hardly a tile can be left out; what is gained is INT8's, or a mask's.\n"
    "How sparse a trained model is, and how far off its outputs are, only a trained model can tell."
)


@dataclass(frozen=True)
class Comparison:
    """Outputs [..., features] of the last round, and seconds of every round."""

    dense: Tensor
    sparse: Tensor
    dense_seconds: list[float]
    sparse_seconds: list[float]

    @property
    def relative_l1(self) -> float:
        """sum |sparse - dense| / sum |dense|."""
        difference = (self.sparse.double() - self.dense.double()).abs().sum()
        return (difference / self.dense.double().abs().sum()).item()

    @property
    def least_cosine(self) -> float:
        """Of the rows (vectors along the last dimension), the one least like its dense counterpart."""
        return F.cosine_similarity(self.sparse.double(), self.dense.double(), dim=-1).min().item()

    def __str__(self) -> str:
        dense, sparse = (statistics.median(seconds) for seconds in (self.dense_seconds, self.sparse_seconds))
        return (
            f"dense   {dense:9.3f} s\n"
            f"sparse  {sparse:9.3f} s   (medians of {len(self.dense_seconds)}, in turn)\n"
            f"relative L1 of the outputs {self.relative_l1:.4f}, least cosine of a row {self.least_cosine:.4f}\n"
            f"{self._verdict()}"
        )

    def _verdict(self) -> str:
        ratios = sorted(d / s for d, s in zip(self.dense_seconds, self.sparse_seconds, strict=True))
        ratio = f"{statistics.median(ratios):.2f} times as fast as dense (between {ratios[0]:.2f} and {ratios[-1]:.2f})"
        if ratios[0] > 1.02:
            return f"sparse is {ratio}"
        if statistics.median(ratios) > 1.02:
            return f"sparse is {ratio}: not in every round, so measure longer before relying on it"
        return f"sparse is NOT faster here: {ratio}; keep it dense at this size"


def compare(dense: Callable[[], Tensor], sparse: Callable[[], Tensor], rounds: int) -> Comparison:
    """Calls both once, to compile and warm up, and then in turn, so that what else the machine does hits both.

    Args:
        dense, sparse: whole runs; they return tensors of one shape [..., features].
        rounds: how often each is measured.
    """
    print(f"one run each, which compiles what is not compiled, then {rounds} rounds ...", flush=True)
    seconds: dict[Callable[[], Tensor], list[float]] = {dense: [], sparse: []}
    with torch.no_grad():
        outputs = {run: run() for run in seconds}
        for _ in range(rounds):
            for run in seconds:
                _wait()
                start = time.perf_counter()
                outputs[run] = run()
                _wait()
                seconds[run].append(time.perf_counter() - start)
    return Comparison(outputs[dense].cpu(), outputs[sparse].cpu(), seconds[dense], seconds[sparse])


def _wait() -> None:
    """Until the GPU, if there is one, has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
