"""What outputs are compared with: exact attention, of all rows or of some where all would take too long."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from problem import Problem
from torch import Tensor

from sparge_kernels.thresholds import K_TILE, Q_TILE

ROWS = 256  # of each head


@dataclass(frozen=True)
class Expected:
    """dense: exact attention over all keys, [1, H, n, D]; words: how it was computed.

    rows: the query rows it holds, int64 [H, n]; None: all of them.
    """

    words: str
    dense: Tensor
    rows: Tensor | None = None

    def of(self, output: Tensor) -> Tensor:
        """The rows of `output` [1, H, S, D] that are known here."""
        if self.rows is None:
            return output
        return output.gather(2, self.rows[None, :, :, None].expand(-1, -1, -1, output.shape[3]))


def every_row(problem: Problem) -> Expected:
    """`F.scaled_dot_product_attention` in fp32."""
    q, k, v = (x.float() for x in problem.inputs)
    return Expected("dense fp32", F.scaled_dot_product_attention(q, k, v, is_causal=problem.is_causal))


def some_rows(problem: Problem) -> Expected:
    """`ROWS` rows of each head in fp64, the same ones for every problem of the same shape."""
    _, heads, tokens, _ = problem.q.shape
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(tokens, generator=generator)[:ROWS] for _ in range(heads)]
    rows = torch.stack(chosen).to(problem.q.device)
    return Expected("dense fp64", attention_rows(problem, rows), rows)


def attention_rows(problem: Problem, rows: Tensor, kept: Tensor | None = None) -> Tensor:
    """fp64 attention [1, H, n, D] of `rows` [H, n] over all tiles, or those `kept`, bool [1, H, nQ, nK]."""
    _, heads, tokens, head_dim = problem.q.shape
    keys = torch.arange(tokens, device=rows.device)
    outputs = []
    for head in range(heads):  # one at a time: fp64 copies of all would take gigabytes
        q, k, v = problem.q[0, head, rows[head]].double(), problem.k[0, head].double(), problem.v[0, head].double()
        scores = q @ k.T * head_dim**-0.5  # [n, S]
        if kept is not None:
            tiles = kept[0, head, rows[head] // Q_TILE]  # [n, nK]
            scores.masked_fill_(~tiles.repeat_interleave(K_TILE, 1)[:, :tokens], -torch.inf)
        if problem.is_causal:
            scores.masked_fill_(keys > rows[head][:, None], -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.stack(outputs)[None]
