"""Random programs around an attention-like piece: each is a list of names of steps, and the torch code they stand for.

Most are not attention, or are attention with something unusual about it. Each step keeps the shape it gets, so that
any sequence of steps is a program; one whose steps do not fit together is an error in eager torch, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Program:
    """What is drawn. `seed` makes the inputs; the rest are names of steps and sizes."""

    layout: str
    dtype: str
    sizes: tuple[int, int, int, int, int, int]  # batch, heads, repeats, queries, keys, head_dim
    mask: str
    scores: str
    before: tuple[str, ...]
    softmax: str
    after: tuple[str, ...]
    values: str
    result: str
    dynamic: bool
    seed: int


@dataclass
class Inputs:
    """The tensors of a program; `parts` is what its function takes."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    closed: Tensor  # bool, True where a key is hidden
    factor: Tensor
    parts: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = (self.query, self.key, self.value, self.mask, self.closed, self.factor)


def inputs_of(program: Program) -> Inputs:
    batch, heads, repeats, q_len, k_len, dim = program.sizes
    random = torch.Generator().manual_seed(program.seed)
    dtype = getattr(torch, program.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    shape = _MASKS[program.mask](batch, heads * repeats, q_len, k_len)
    closed = torch.rand(shape, generator=random) < 0.4
    if program.seed % 3 == 0:
        closed[..., :1, :] = True  # a query that sees nothing
    kv = (batch, heads, k_len, dim)
    return Inputs(
        normal(batch, heads * repeats, q_len, dim), normal(*kv), normal(*kv), normal(*shape), closed, normal(1)
    )


_MASKS: dict[str, Callable[..., tuple[int, ...]]] = {
    "full": lambda b, h, q, k: (b, h, q, k),
    "queries-keys": lambda b, h, q, k: (q, k),
    "heads": lambda b, h, q, k: (h, q, k),
    "batch": lambda b, h, q, k: (b, 1, q, k),
    "padding": lambda b, h, q, k: (b, 1, 1, k),
    "queries": lambda b, h, q, k: (1, 1, q, 1),
    "keys": lambda b, h, q, k: (1, k),
}


@dataclass(frozen=True)
class Given:
    """What the steps of one run may use."""

    mask: Tensor
    closed: Tensor
    factor: Tensor
    layout: str


def _later(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2], scores.shape[-1], dtype=torch.bool).triu(1)


def _added_in_place(scores: Tensor, given: Given) -> Tensor:
    scores += given.mask
    return scores


_ON_SCORES: dict[str, Callable[[Tensor, Given], Tensor]] = {
    "scale": lambda s, g: s * 0.3,
    "scale-left": lambda s, g: 0.5 * s,
    "divide": lambda s, g: s / math.sqrt(6),
    "divide-method": lambda s, g: s.div(1.7),
    "negate": lambda s, g: -s,
    "scale-tensor": lambda s, g: s * g.factor,
    "add": lambda s, g: s + g.mask,
    "add-left": lambda s, g: g.mask + s,
    "subtract": lambda s, g: s - g.mask,
    "subtract-from": lambda s, g: g.mask - s,
    "add-number": lambda s, g: s + 3.0,
    "add-closed": lambda s, g: s + (1.0 - (~g.closed).to(s.dtype)) * torch.finfo(s.dtype).min,
    "add-inf": lambda s, g: s + torch.zeros(g.closed.shape, dtype=s.dtype).masked_fill(g.closed, -math.inf),
    "fill-inf": lambda s, g: s.masked_fill(g.closed, -math.inf),
    "fill-low": lambda s, g: s.masked_fill(g.closed, -1e9),
    "fill-lowest": lambda s, g: s.masked_fill(g.closed, torch.finfo(s.dtype).min),
    "fill-small": lambda s, g: s.masked_fill(g.closed, -3.0),
    "fill-positive": lambda s, g: s.masked_fill(g.closed, 5.0),
    "fill-in-place": lambda s, g: s.masked_fill_(g.closed, -math.inf),
    "where": lambda s, g: torch.where(g.closed, -math.inf, s),
    "where-open": lambda s, g: torch.where(~g.closed, s, -1e9),
    "where-open-tensor": lambda s, g: torch.where(~g.closed, s, torch.full((), LOWEST, dtype=s.dtype)),
    "where-mask": lambda s, g: torch.where(g.closed, g.mask, s),
    "causal": lambda s, g: s.masked_fill(_later(s), -math.inf),
    "causal-low": lambda s, g: s.masked_fill(_later(s), -1e4),
    "causal-tril": lambda s, g: s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, -math.inf),
    "causal-added": lambda s, g: s + torch.full(s.shape[-2:], -math.inf, dtype=s.dtype).triu(1),
    "float": lambda s, g: s.float(),
    "bfloat16": lambda s, g: s.to(torch.bfloat16),
    "softcap": lambda s, g: torch.tanh(s / 5) * 5,
    "clamp": lambda s, g: s.clamp(-1, 1),
    "added-in-place": _added_in_place,
    "scaled-in-place": lambda s, g: s.mul_(0.5),
    "split-heads": lambda s, g: s.flatten(0, -3).unflatten(0, s.shape[:-2]),
    "transposed-twice": lambda s, g: s.transpose(-1, -2).transpose(-1, -2),
    "contiguous": lambda s, g: s.contiguous(),
    "clone": lambda s, g: s.clone(),
    "minus-largest": lambda s, g: s - s.amax(-1, keepdim=True),
    "roll": lambda s, g: s.roll(1, -1),
    "flip": lambda s, g: s.flip(-1),
    "mix-heads": lambda s, g: s + s.mean(1, keepdim=True),
    "nan-to-num": lambda s, g: s.nan_to_num(),
    "dropout": lambda s, g: F.dropout(s, 0.5, training=False),
}

_ON_WEIGHTS: dict[str, Callable[[Tensor, Given], Tensor]] = {
    "dropout": lambda p, g: F.dropout(p, 0.1, training=False),
    "dropout-zero": lambda p, g: F.dropout(p, 0.0, training=True),
    "cast": lambda p, g: p.to(g.factor.dtype),
    "type-as": lambda p, g: p.type_as(g.factor),
    "half-of-it": lambda p, g: p * 0.5,
    "head-mask": lambda p, g: p * g.factor,
    "plus": lambda p, g: p + 0.1,
    "normalize": lambda p, g: p / p.sum(-1, keepdim=True),
    "masked": lambda p, g: p.masked_fill(g.closed, 0.0),
    "nan-to-num": lambda p, g: p.nan_to_num(0.0),
    "roll": lambda p, g: p.roll(1, -2),
    "detach": lambda p, g: p.detach(),
    "contiguous": lambda p, g: p.contiguous(),
    "split-heads": lambda p, g: p.flatten(0, -3).unflatten(0, p.shape[:-2]),
    "again": lambda p, g: p.softmax(-1),
    "scaled-in-place": lambda p, g: p.mul_(2.0),
}

_SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda s: F.softmax(s, dim=-1),
    "torch": lambda s: torch.softmax(s, s.dim() - 1),
    "method": lambda s: s.softmax(-1),
    "in-float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32),
    "float-and-back": lambda s: F.softmax(s.float(), dim=-1).to(s.dtype),
    "over-queries": lambda s: s.softmax(-2),
    "over-heads": lambda s: s.softmax(0 if s.dim() == 3 else 1),
    "log": lambda s: F.log_softmax(s, dim=-1),
    "log-exp": lambda s: F.log_softmax(s, dim=-1).exp(),
    "by-hand": lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
    "sigmoid": lambda s: s.sigmoid(),
    "relu": lambda s: s.relu(),
    "minus": lambda s: (-s).softmax(-1),
}

_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operator": lambda q, k: q @ k.transpose(-1, -2),
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-2, -1)),
    "method": lambda q, k: q.matmul(k.mT),
    "permute": lambda q, k: q @ k.permute(*range(k.dim() - 2), k.dim() - 1, k.dim() - 2),
    "scaled-q": lambda q, k: (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2),
    "scaled-both": lambda q, k: (q * 0.6) @ (k * 0.7).transpose(-1, -2),
    "scaled-k": lambda q, k: q @ (k.transpose(-1, -2) / 2),
    "in-float32": lambda q, k: q.float() @ k.float().transpose(-1, -2),
    "einsum": lambda q, k: torch.einsum("...qd,...kd->...qk", q, k) if q.dim() == 3 else _einsum(q, k),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, -3), k.flatten(0, -3).mT).unflatten(0, q.shape[:-2]),
    "baddbmm": lambda q, k: torch.baddbmm(
        torch.empty(1, 1, 1, dtype=q.dtype), q.flatten(0, -3), k.flatten(0, -3).mT, beta=0, alpha=0.4
    ).unflatten(0, q.shape[:-2]),
    "baddbmm-bias": lambda q, k: torch.baddbmm(
        torch.full((1, 1, 1), 0.5, dtype=q.dtype), q.flatten(0, -3), k.flatten(0, -3).mT, beta=0.3
    ).unflatten(0, q.shape[:-2]),
    "keys-first": lambda q, k: (k @ q.transpose(-1, -2)).transpose(-1, -2),
    "shifted": lambda q, k: q @ k.roll(1, -2).transpose(-1, -2),
}


def _einsum(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhqd,bhkd->bhqk", q, k)


_VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operator": lambda p, v: p @ v,
    "matmul": lambda p, v: torch.matmul(p, v),
    "cast": lambda p, v: p.to(v.dtype) @ v,
    "values-cast": lambda p, v: p @ v.to(p.dtype),
    "bmm": lambda p, v: torch.bmm(p.flatten(0, -3), v.flatten(0, -3)).unflatten(0, p.shape[:-2]),
    "einsum": lambda p, v: torch.einsum("bhqk,bhkd->bhqd", p, v),
    "einsum-tokens-first": lambda p, v: torch.einsum("bhqk,bhkd->bqhd", p, v),
    "weights-transposed": lambda p, v: p.transpose(-1, -2) @ v,
    "values-first": lambda p, v: (v.transpose(-1, -2) @ p.transpose(-1, -2)).transpose(-1, -2),
    "values-shifted": lambda p, v: p @ v.roll(1, -2),
}

_RESULTS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "as-it-is": lambda out, p, s: out,
    "joined": lambda out, p, s: out.transpose(-3, -2).flatten(-2),
    "scaled": lambda out, p, s: out * 2 + 1,
    "viewed": lambda out, p, s: out.contiguous().view(-1, out.shape[-1]),
    "in-place": lambda out, p, s: out.add_(1.0),
    "with-weights": lambda out, p, s: (out, p),
    "with-scores": lambda out, p, s: (out, s),
    "weights-used": lambda out, p, s: out + p.sum(),
}


def function_of(program: Program) -> Callable[..., Any]:
    """The program as a function of `Inputs.parts`."""
    repeats = program.sizes[2]

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, closed: Tensor, factor: Tensor) -> Any:
        given = Given(mask, closed, factor, program.layout)
        if program.layout == "tokens-first":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        if repeats > 1:
            k, v = _repeat(k, repeats, program.seed), _repeat(v, repeats, program.seed)
        if program.layout == "one-batch":
            q, k, v = q[0], k[0], v[0]
        scores = _SCORES[program.scores](q, k)
        for step in program.before:
            scores = _ON_SCORES[step](scores, given)
        weights = _SOFTMAX[program.softmax](scores)
        for step in program.after:
            weights = _ON_WEIGHTS[step](weights, given)
        return _RESULTS[program.result](_VALUES[program.values](weights, v), weights, scores)

    return function


def _repeat(x: Tensor, repeats: int, seed: int) -> Tensor:
    if seed % 4 == 0:
        return x.repeat(1, repeats, 1, 1)  # not what grouped-query attention does
    if seed % 4 == 1:
        return x.repeat_interleave(repeats, dim=1)
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, repeats, tokens, dim).reshape(batch, heads * repeats, tokens, dim)


def _names(table: dict[str, Any], usual: int) -> st.SearchStrategy[str]:
    """One of the names; the first `usual` of them in half of the cases."""
    names = list(table)
    return st.one_of(st.sampled_from(names[:usual]), st.sampled_from(names))


programs = st.builds(
    Program,
    layout=st.sampled_from(["heads-first", "tokens-first", "one-batch"]),
    dtype=st.sampled_from(["float32", "float32", "bfloat16"]),
    sizes=st.tuples(
        st.integers(1, 2),
        st.integers(1, 2),
        st.sampled_from([1, 1, 2]),
        st.sampled_from([1, 3, 5, 65]),
        st.sampled_from([1, 3, 5, 66]),
        st.sampled_from([4, 8]),
    ),
    mask=st.sampled_from(list(_MASKS)),
    scores=_names(_SCORES, 8),
    before=st.lists(st.sampled_from(list(_ON_SCORES)), max_size=3).map(tuple),
    softmax=_names(_SOFTMAX, 5),
    after=st.one_of(st.just(()), st.lists(st.sampled_from(list(_ON_WEIGHTS)), max_size=2).map(tuple)),
    values=_names(_VALUES, 6),
    result=_names(_RESULTS, 4),
    dynamic=st.booleans(),
    seed=st.integers(0, 11),
)
