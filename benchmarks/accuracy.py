"""The checks that come before every time: what an output must agree with, and how closely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peers import Peer
from problem import Problem
from torch import Tensor

from sparge_kernels import reference
from sparge_kernels.thresholds import NEVER_SKIP, Thresholds

KEEP_ALL = Thresholds(topk=1.0, cdf=1.0, similarity=-1.0, pv=NEVER_SKIP)
SAME_TILES_LIMIT = 2e-2  # relative L1 between two peers that compute the same tiles


@dataclass(frozen=True)
class Accuracy:
    """Of an output against dense fp32 attention. worst_cosine: of the row that differs most."""

    relative_l1: float
    worst_cosine: float


def compare(output: Tensor, dense: Tensor) -> Accuracy:
    cosines = F.cosine_similarity(output.float(), dense.float(), dim=-1)
    return Accuracy(relative_l1(output, dense), float(cosines.min()))


def relative_l1(output: Tensor, expected: Tensor) -> float:
    """sum |output - expected| / sum |expected|."""
    expected = expected.float()
    return float((output.float() - expected).abs().sum() / expected.abs().sum())


def dense_limit(peer: Peer, problem: Problem) -> float:
    """Largest relative L1 to dense fp32 attention of a peer that skips nothing."""
    if not peer.sparse or problem.precision == "int8":
        return 2e-2
    return 1e-4 if problem.dtype == torch.float32 else 5e-3


def failure(
    peer: Peer, problem: Problem, small: Problem, *, output: Tensor, dense: Tensor, same_tiles: Tensor | None
) -> str | None:
    """None if `output` may be believed, else the reason in words.

    small: a problem of the same kind that the reference can afford. dense: dense fp32 attention of `problem`.
    same_tiles: the output of a peer that computes the same tiles, if there is one.
    """
    if not output.isfinite().all():
        return "failed: the output is not finite"
    errors = []
    if problem.topk == 1 or not peer.sparse:
        errors.append(("dense fp32", relative_l1(output, dense), dense_limit(peer, problem)))
    if same_tiles is not None:
        errors.append(("sparge over the same tiles", relative_l1(output, same_tiles), SAME_TILES_LIMIT))
    if peer.reference_limit is not None:
        errors.append(("the reference on a small problem", reference_error(peer, small), peer.reference_limit))
    for other, error, limit in errors:
        if not error <= limit:
            return f"failed: relative L1 {error:.2g} to {other}, allowed is {limit:.2g}"
    return None


def reference_error(peer: Peer, small: Problem) -> float:
    """Relative L1 of the peer's output to that of `sparge_kernels.reference`."""
    expected = reference.attention(
        *small.inputs,
        thresholds=[small.thresholds if peer.sparse else KEEP_ALL],
        is_causal=small.is_causal,
        precision=small.precision if peer.sparse else "none",
    )
    return relative_l1(peer.prepare(small)(), expected.output)
