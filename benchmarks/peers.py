"""Ways to compute one attention call, registered by device and name: the project's kernel and what users have instead.

A peer takes a `Problem`, does what is not timed (casts, tile lists) and returns the call to time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from problem import Problem
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparge_kernels import ops  # noqa: F401 - registers the operator
from sparge_kernels.masks import causal_tiles
from sparge_kernels.predict import select_tiles
from sparge_kernels.thresholds import K_TILE, Q_TILE, pack

Call = Callable[[], Tensor]

OURS = "sparge"
DENSE = "dense"
"""First word of the names of dense peers: the faster one is the baseline."""


@dataclass(frozen=True)
class Peer:
    """prepare: gives the call. sparse: it computes the kept tiles only. reference_limit: largest relative L1 to
    `sparge_kernels.reference` on a small problem; None where only the outputs of other peers are compared.
    """

    prepare: Callable[[Problem], Call]
    sparse: bool
    reference_limit: float | None


def dense(dtype: torch.dtype) -> Callable[[Problem], Call]:
    """`F.scaled_dot_product_attention` in `dtype`."""

    def prepare(problem: Problem) -> Call:
        q, k, v = (x.to(dtype) for x in problem.inputs)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=problem.is_causal)

    return prepare


def sparge(problem: Problem) -> Call:
    """The project's kernel."""
    q, k, v = (x.to(problem.dtype) for x in problem.inputs)
    thresholds = pack([problem.thresholds])
    return lambda: torch.ops.sparge.attention.default(
        q, k, v, thresholds=thresholds, is_causal=problem.is_causal, precision=problem.precision
    )


def sparge_density(problem: Problem) -> float:
    """Share of the visible tiles that the project's kernel computes, mean over heads."""
    q, k, v = (x.to(problem.dtype) for x in problem.inputs)
    _, density, _ = torch.ops.sparge.attention_with_stats.default(
        q, k, v, thresholds=pack([problem.thresholds]), is_causal=problem.is_causal, precision=problem.precision
    )
    return float(density.mean())


def flex(problem: Problem) -> Call:
    """Compiled FlexAttention over the tiles that the project's kernel keeps; choosing them is not timed."""
    q, k, v = (x.to(problem.dtype) for x in problem.inputs)
    block_mask = kept_blocks(problem)
    torch.compiler.reset()  # each shape is compiled for itself; without this the limit on recompilations is met
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=block_mask)


def kept_blocks(problem: Problem) -> BlockMask:
    """Stage 1's map as a BlockMask: tiles on the causal diagonal are masked, all others full."""
    q, k, v = problem.inputs
    tokens = q.shape[2]
    kept = select_tiles(
        q,
        k,
        v,
        thresholds=[problem.thresholds] * q.shape[1],
        is_causal=problem.is_causal,
        scale=q.shape[3] ** -0.5,
    )
    diagonal = causal_tiles(tokens, tokens, problem.is_causal, q.dtype, q.device).partial
    return BlockMask.from_kv_blocks(
        *_counted(kept & diagonal),
        *_counted(kept & ~diagonal),
        BLOCK_SIZE=(Q_TILE, K_TILE),
        mask_mod=_past if problem.is_causal else None,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,  # only a backward needs them
    )


def _past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _counted(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are set, and all of the row's tiles, those first: [..., nQ], [..., nQ, nK]."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


PEERS: dict[str, dict[str, Peer]] = {
    "cpu": {
        "dense fp32": Peer(dense(torch.float32), sparse=False, reference_limit=1e-4),
        "dense bf16": Peer(dense(torch.bfloat16), sparse=False, reference_limit=2e-2),
        OURS: Peer(sparge, sparse=True, reference_limit=1e-2),
        "flex": Peer(flex, sparse=True, reference_limit=None),
    },
}
"""By device. A dense peer and the project's kernel are always measured."""


def optional_peers(device: str) -> list[str]:
    """What `--peers` may name: the first words of the names, without the project's own kernel."""
    return sorted({name.split()[0] for name in PEERS[device]} - {OURS})
