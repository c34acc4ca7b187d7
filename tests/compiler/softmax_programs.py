"""Attention written out by hand, in the spellings that models have; each takes q, k, v [2, 2, 12, 8]."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH, HEADS, TOKENS, DIM = 2, 2, 12, 8
SCALE = DIM**-0.5


def tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B * H, S, D]"""
    return x.reshape(-1, x.shape[2], x.shape[3])


def in_diffusers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention processor without scaled_dot_product_attention, upcast left out."""

    def heads_to_batch(x: Tensor) -> Tensor:
        x = x.transpose(1, 2).reshape(BATCH, -1, HEADS, DIM)
        return x.permute(0, 2, 1, 3).reshape(BATCH * HEADS, -1, DIM)

    q, k, v = (heads_to_batch(x) for x in (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    out = torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)
    return out.reshape(BATCH, HEADS, -1, DIM).permute(0, 2, 1, 3).reshape(BATCH, -1, HEADS * DIM)


def in_bart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores [B * H, S, S], seen as [B, H, S, S] for the mask and back."""
    scores = torch.bmm(merged(q * SCALE), merged(k).transpose(1, 2))
    scores = scores.view(-1, HEADS, q.shape[2], k.shape[2]) + torch.eye(q.shape[2], k.shape[2], dtype=q.dtype)
    scores = scores.view(-1, q.shape[2], k.shape[2])
    out = torch.bmm(F.dropout(F.softmax(scores, dim=-1), p=0.1, training=False), merged(v))
    return out.view(-1, HEADS, q.shape[2], v.shape[3]).transpose(1, 2)


def in_an_autoencoder(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Channels first, weights transposed and on the right of the values."""
    q, k, v = q[:, 0].transpose(1, 2), k[:, 0].transpose(1, 2), v[:, 0].transpose(1, 2)
    weights = torch.bmm(q.permute(0, 2, 1), k) * SCALE
    return torch.bmm(v, F.softmax(weights, dim=2).permute(0, 2, 1))


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    scores *= 0.5
    scores.div_(2.0)
    scores += torch.zeros(TOKENS)
    return scores.softmax(-1) @ v


def transposed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (k @ q.transpose(2, 3) * SCALE).transpose(2, 3).softmax(-1) @ v


def constant_tensors(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)) / torch.full([], DIM**0.5, dtype=q.dtype)
    lowest = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.where(torch.ones(TOKENS, TOKENS).tril().bool(), scores, lowest).softmax(-1) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.float() @ k.float().transpose(2, 3)) * SCALE
    return scores.softmax(-1).to(v.dtype) @ v


def _einsum(first: str, second: str, arrange: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = arrange(q), arrange(k), arrange(v)
        return torch.einsum(second, (torch.einsum(first, q, k) * SCALE).softmax(-1), v)

    return attention


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "matmul": lambda q, k, v: torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * SCALE, dim=-1), v),
    "operator": lambda q, k, v: F.softmax(q @ k.transpose(2, 3) * SCALE, -1) @ v,
    "operator-function": lambda q, k, v: operator.matmul((operator.matmul(q, k.mT)).softmax(3), v),
    "method": lambda q, k, v: q.matmul(k.permute(0, 1, 3, 2)).mul(SCALE).softmax(dim=-1).matmul(v),
    "mT": lambda q, k, v: torch.softmax((q @ k.mT) * SCALE, -1) @ v,
    "aten": lambda q, k, v: torch.ops.aten.matmul(
        torch.ops.aten.softmax.int(torch.ops.aten.matmul(q, k.mT).mul(SCALE), -1), v
    ),
    "special-softmax": lambda q, k, v: torch.special.softmax(q @ k.mT, -1) @ v,
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(merged(q), merged(k).mT).mul(SCALE).softmax(2), merged(v)),
    "bmm-method": lambda q, k, v: merged(q).bmm(merged(k).transpose(1, 2)).softmax(-1).bmm(merged(v)),
    "bmm-unmerged": lambda q, k, v: torch.bmm((q[0] @ k[0].mT).softmax(-1), v[0]),
    "baddbmm": in_diffusers,
    "baddbmm-mask": lambda q, k, v: torch.bmm(
        torch.baddbmm(torch.eye(12).expand(4, 12, 12), merged(q), merged(k).mT, alpha=SCALE).softmax(-1), merged(v)
    ),
    "baddbmm-method": lambda q, k, v: (
        torch.eye(12).expand(4, 12, 12).baddbmm(merged(q), merged(k).mT, beta=1, alpha=0.5).softmax(-1) @ merged(v)
    ),
    "two-dimensions": lambda q, k, v: torch.softmax(q[0, 0] @ k[0, 0].T, -1) @ v[0, 0],
    "mm": lambda q, k, v: torch.mm(torch.softmax(torch.mm(q[0, 0], k[0, 0].t()) / 3, 1), v[0, 0]),
    "einsum-bhsd": _einsum("bhid,bhjd->bhij", "bhij,bhjd->bhid"),
    "einsum-bshd": _einsum("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", tokens_first),
    "einsum-spaces": _einsum("b h i d, b h j d -> b h i j", "b h i j, b h j d -> b h i d"),
    "einsum-other-letters": _einsum("bnqd,bnkd->bnqk", "bnqk,bnkc->bnqc"),
    "einsum-heads-last": _einsum("bqhd,bkhd->bqhk", "bqhk,bkhd->bqhd", tokens_first),
    "einsum-tokens-outermost": _einsum("qbhd,kbhd->bhqk", "bhqk,kbhd->qbhd", lambda x: x.permute(2, 0, 1, 3)),
    "einsum-three": _einsum("bid,bjd->bij", "bij,bjd->bid", merged),
    "einsum-ellipsis": _einsum("...id,...jd->...ij", "...ij,...jd->...id"),
    "einsum-swapped": lambda q, k, v: torch.einsum(
        "bhkd,bhqk->bhqd", v, torch.einsum("bhkd,bhqd->bhqk", k, q).softmax(-1)
    ),
    "einsum-then-matmul": lambda q, k, v: (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(-1) @ v,
    "no-scale": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "scale-on-q": lambda q, k, v: ((q * SCALE) @ k.mT).softmax(-1) @ v,
    "scale-on-k": lambda q, k, v: (q @ (k * SCALE).mT).softmax(-1) @ v,
    "scale-on-both": lambda q, k, v: ((q * DIM**-0.25) @ (k.mT * DIM**-0.25)).softmax(-1) @ v,
    "scale-twice": lambda q, k, v: ((q / 2) @ k.mT * 0.3 / 0.7).softmax(-1) @ v,
    "scale-first": lambda q, k, v: (0.7 * (q @ k.mT)).softmax(-1) @ v,
    "division": lambda q, k, v: ((q @ k.mT) / math.sqrt(DIM)).softmax(-1) @ v,
    "torch-div": lambda q, k, v: torch.div(q @ k.mT, math.sqrt(q.size(-1))).softmax(-1) @ v,
    "constant-tensors": constant_tensors,
    "sqrt-of-a-tensor": lambda q, k, v: ((q @ k.mT) / torch.sqrt(torch.tensor(DIM, dtype=q.dtype))).softmax(-1) @ v,
    "fp32-softmax": lambda q, k, v: F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v,
    "float-scores": lambda q, k, v: (q @ k.mT).float().softmax(-1).type_as(v) @ v,
    "upcast": upcast,
    "eval-dropout": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.3, training=False) @ v,
    "dropout-of-nothing": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), p=0.0, training=True) @ v,
    "contiguous": lambda q, k, v: (q @ k.mT).contiguous().softmax(-1).contiguous() @ v.contiguous(),
    "bart": in_bart,
    "autoencoder": in_an_autoencoder,
    "in-place": in_place,
    "transposed-scores": transposed_scores,
    "cross": lambda q, k, v: ((q[:, :, :7] @ k.mT) * SCALE).softmax(-1) @ v,
    "other-value-dim": lambda q, k, v: ((q @ k.mT) * SCALE).softmax(-1) @ v[..., :5],
    "unused-statistics": lambda q, k, v: ((q @ k.mT) + torch.zeros_like(q @ k.mT)).softmax(-1) @ v,
}
