"""Ways to compute one attention call, by name: the project's kernel and what users have instead. Here those of the CPU.

A peer takes a `Problem`, does what is not timed (casts, tile lists) and returns the call to time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sparge_compile.bench.block_mask import block_mask
from sparge_compile.bench.problem import Problem
from sparge_kernels import ops  # noqa: F401 - registers the operator
from sparge_kernels.predict import select_tiles
from sparge_kernels.thresholds import pack

Call = Callable[[], Tensor]

OURS = "sparge"
DENSE = "dense"
"""First word of the names of dense peers: the fastest one is the baseline."""


@dataclass(frozen=True)
class Peer:
    """prepare: gives the call. sparse: it computes the kept tiles only. reference_limit: largest relative L1 to
    `sparge_kernels.reference` (of that `centring`) on a small problem; None where only outputs of the full size are
    compared. exact_limit: largest relative L1 to exact attention over the same tiles.
    """

    prepare: Callable[[Problem], Call]
    sparse: bool
    reference_limit: float | None = None
    centring: str = "tile"
    exact_limit: float = 2e-2


def dense(dtype: torch.dtype) -> Callable[[Problem], Call]:
    """`F.scaled_dot_product_attention` in `dtype`."""

    def prepare(problem: Problem) -> Call:
        q, k, v = (x.to(dtype) for x in problem.inputs)
        options: dict[str, Any] = {"is_causal": problem.is_causal, "enable_gqa": problem.group > 1}
        return lambda: F.scaled_dot_product_attention(q, k, v, **options)

    return prepare


def sparge(problem: Problem) -> Call:
    """The project's kernel."""
    q, k, v = problem.inputs
    options = _sparge_options(problem)
    return lambda: torch.ops.sparge.attention.default(q, k, v, **options)


def sparge_density(problem: Problem) -> float:
    """Share of the visible tiles that the project's kernel computes, mean over heads."""
    _, density, _ = torch.ops.sparge.attention_with_stats.default(*problem.inputs, **_sparge_options(problem))
    return float(density.mean())


def _sparge_options(problem: Problem) -> dict[str, Any]:
    return {
        "thresholds": pack([problem.choice.thresholds]),
        "is_causal": problem.is_causal,
        "enable_gqa": problem.group > 1,
        "precision": problem.precision,
        "predictor": problem.choice.predictor,
    }


def flex(
    kept: Callable[[Problem], Tensor], kernel_options: Mapping[str, Any] | None = None
) -> Callable[[Problem], Call]:
    """Compiled FlexAttention over the tiles `kept`, bool [B, H, nQ, nK], of a problem; choosing them is not timed."""

    def prepare(problem: Problem) -> Call:
        q, k, v = problem.inputs
        mask = block_mask(kept(problem), q.shape[2], k.shape[2], problem.is_causal)
        compiled = _compiled_flex(q.shape, k.shape, q.dtype, problem.is_causal)
        options: dict[str, Any] = {"enable_gqa": problem.group > 1, "kernel_options": kernel_options}
        return lambda: compiled(q, k, v, block_mask=mask, **options)

    return prepare


@functools.lru_cache(maxsize=1)
def _compiled_flex(q: torch.Size, k: torch.Size, dtype: torch.dtype, is_causal: bool) -> Callable[..., Tensor]:
    """For one kind of problem, all densities."""
    torch.compiler.reset()  # each shape is compiled for itself; without this the limit on recompilations is met
    return torch.compile(flex_attention, dynamic=False)


def predicted_tiles(problem: Problem) -> Tensor:
    """Stage 1's map as the specification has it, bool [B, H, nQ, nK]."""
    q, k, v = (x.float() for x in problem.inputs)
    return select_tiles(
        q,
        k,
        v,
        thresholds=[problem.choice.thresholds] * q.shape[1],
        is_causal=problem.is_causal,
        scale=q.shape[3] ** -0.5,
        predictor=problem.choice.predictor,
    )


CPU_PEERS = {
    "dense fp32": Peer(dense(torch.float32), sparse=False, reference_limit=1e-4),
    "dense bf16": Peer(dense(torch.bfloat16), sparse=False, reference_limit=2e-2),
    OURS: Peer(sparge, sparse=True, reference_limit=1e-2),
    "flex": Peer(flex(predicted_tiles), sparse=True),
}


def optional_peers(peers: Mapping[str, Peer]) -> list[str]:
    """What `--peers` may name: the first words of the names, without the project's own kernel."""
    return sorted({name.split()[0] for name in peers} - {OURS})
