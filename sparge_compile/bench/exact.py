"""What outputs are compared with: exact attention, of all rows or of some where all would take too long."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.bench.problem import Problem
from sparge_kernels.thresholds import K_TILE, Q_TILE

ROWS = 256  # of each head


@dataclass(frozen=True)
class Expected:
    """dense: exact attention over all keys, [B, H, n, Dv]; words: how it was computed.

    rows: the query rows it holds, int64 [H, n]; None: all of them.
    """

    words: str
    dense: Tensor
    rows: Tensor | None = None

    def of(self, output: Tensor) -> Tensor:
        """The rows of `output` [B, H, Sq, Dv] that are known here."""
        if self.rows is None:
            return output
        return output.gather(2, self.rows[None, :, :, None].expand(output.shape[0], -1, -1, output.shape[3]))


def every_row(problem: Problem) -> Expected:
    """`F.scaled_dot_product_attention` in fp32."""
    q, k, v = (x.float() for x in problem.inputs)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=problem.is_causal, enable_gqa=problem.group > 1)
    return Expected("dense fp32", dense)


def some_rows(problem: Problem) -> Expected:
    """`ROWS` rows of each head in fp64, the same ones for every problem of the same shape."""
    _, heads, q_len, _ = problem.q.shape
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(q_len, generator=generator)[:ROWS] for _ in range(heads)]
    rows = torch.stack(chosen).to(problem.q.device)
    return Expected("dense fp64", attention_rows(problem, rows), rows)


def attention_rows(problem: Problem, rows: Tensor, kept: Tensor | None = None) -> Tensor:
    """fp64 attention [B, H, n, Dv] of `rows` [H, n] over all tiles, or those `kept`, bool [B, H, nQ, nK]."""
    batch, heads, _, _ = problem.q.shape
    # One head at a time: fp64 copies of all would take gigabytes.
    outputs = [_rows_of_head(problem, entry, head, rows[head], kept) for entry in range(batch) for head in range(heads)]
    return torch.stack(outputs).unflatten(0, (batch, heads))


def _rows_of_head(problem: Problem, entry: int, head: int, rows: Tensor, kept: Tensor | None) -> Tensor:
    kv_head, k_len = head // problem.group, problem.k.shape[2]
    q, k, v = problem.q[entry, head, rows], problem.k[entry, kv_head], problem.v[entry, kv_head]
    scores = q.double() @ k.double().T * q.shape[1] ** -0.5  # [n, Sk]
    if kept is not None:
        tiles = kept[entry, head, rows // Q_TILE]  # [n, nK]
        scores.masked_fill_(~tiles.repeat_interleave(K_TILE, 1)[:, :k_len], -torch.inf)
    if problem.is_causal:
        scores.masked_fill_(torch.arange(k_len, device=rows.device) > rows[:, None], -torch.inf)
    return scores.softmax(-1) @ v.double()
