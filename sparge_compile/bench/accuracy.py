"""The checks that come before every time: what an output must agree with, and how closely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparge_compile import search
from sparge_compile.bench.exact import Expected
from sparge_compile.bench.peers import Peer
from sparge_compile.bench.problem import ALL_TILES, Problem
from sparge_kernels import reference

SAME_TILES_LIMIT = 2e-2  # relative L1 between two peers that compute the same tiles
LEAST_COSINE = 0.99  # of a row where every tile is computed: a mean error hides a tile of queries that is all wrong
LEAST_COSINE_OF_INT8 = 0.95
SELECTION_LIMIT = 2e-3  # share of the tiles that two ways to choose them may differ in: rounding decides equal scores


@dataclass(frozen=True)
class Accuracy:
    """Of an output against dense exact attention. worst_cosine: of the row that differs most."""

    relative_l1: float
    worst_cosine: float


@dataclass(frozen=True)
class Check:
    """What an output of `problem` must agree with, beside `expected`, its dense attention.

    small: a problem of the same kind that the reference can afford. kept: exact attention over the tiles to compute, of
    the rows of `expected`. same_tiles: the output of a peer that computes them. selection: share of the tiles in which
    the kernel's choice differs from the specification's. None: not known, or no question.
    """

    problem: Problem
    small: Problem
    expected: Expected
    kept: Tensor | None = None
    same_tiles: Tensor | None = None
    selection: float | None = None


def compare(output: Tensor, expected: Expected) -> Accuracy:
    rows, dense = expected.of(output), expected.dense
    _, _, worst = search.compare(rows, dense)  # as `calibrate` has it
    return Accuracy(relative_l1(rows, dense), float(worst.min()))


def relative_l1(output: Tensor, expected: Tensor) -> float:
    """sum |output - expected| / sum |expected|."""
    expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
    return float((output.to(expected.dtype) - expected).abs().sum() / expected.abs().sum())


def exact_limit(peer: Peer, problem: Problem) -> float:
    """Largest relative L1 to exact attention over the same tiles."""
    if not peer.sparse or problem.precision == "int8":
        return peer.exact_limit
    return 1e-4 if problem.dtype == torch.float32 else 5e-3


def least_cosine(peer: Peer, problem: Problem) -> float | None:
    """Of a row to dense attention; None: any will do, and is shown."""
    choice = problem.choice
    if not peer.sparse or (choice.keeps_all and problem.precision == "none"):
        return LEAST_COSINE
    # INT8 rounds peaked scores (of a standard deviation of 9, say) to rows of .975, a right kernel's too.
    return LEAST_COSINE_OF_INT8 if choice.keeps_all else choice.min_row_cosine


def failure(peer: Peer, output: Tensor, check: Check) -> str | None:
    """None if `output` may be believed, else the reason in words."""
    if not output.isfinite().all():
        return "the output is not finite"
    choice, found = check.problem.choice, compare(output, check.expected)
    errors = []
    rows, limit = check.expected.of(output), exact_limit(peer, check.problem)
    allowed = limit if choice.keeps_all or not peer.sparse else choice.max_error
    if allowed is not None:
        errors.append((f"relative L1 to {check.expected.words}", found.relative_l1, allowed))
    if check.kept is not None and peer.sparse:
        errors.append(("relative L1 to fp64 over the same tiles", relative_l1(rows, check.kept), limit))
    if check.same_tiles is not None:
        same = relative_l1(output, check.same_tiles)
        errors.append(("relative L1 to sparge over the same tiles", same, SAME_TILES_LIMIT))
    if peer.reference_limit is not None:
        error = reference_error(peer, check.small)
        errors.append(("relative L1 to the reference on a small problem", error, peer.reference_limit))
    # With a limit on mass in place of a density, rounding decides more tiles; there max_error is the gate.
    if check.selection is not None and peer.sparse and choice.density is not None:
        errors.append(("share of tiles chosen unlike the specification", check.selection, SELECTION_LIMIT))
    for what, error, most in errors:
        if not error <= most:
            return f"{what} is {error:.2g}, allowed is {most:.2g}"
    least = least_cosine(peer, check.problem)
    if least is not None and not found.worst_cosine >= least:
        words = f"the worst row's cosine to {check.expected.words} is {found.worst_cosine:.3g}"
        return f"{words}, allowed is {least:.3g} or more"
    return None


def reference_error(peer: Peer, small: Problem) -> float:
    """Relative L1 of the peer's output to that of `sparge_kernels.reference`."""
    expected = reference.attention(
        *(x.float() for x in small.inputs),
        thresholds=[(small.choice if peer.sparse else ALL_TILES).thresholds],
        enable_gqa=small.group > 1,
        predictor=small.choice.predictor,
        is_causal=small.is_causal,
        precision=small.precision if peer.sparse else "none",
        centring=peer.centring,
    )
    return relative_l1(peer.prepare(small)(), expected.output)
