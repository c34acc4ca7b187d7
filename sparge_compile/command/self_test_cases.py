"""The calls of the doctor's self-test, and what is right for each."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparge_compile.bench.accuracy import LEAST_COSINE
from sparge_compile.bench.problem import ALL_TILES, Choice, of_policy, share, smooth_problem
from sparge_compile.policy import Policy
from sparge_compile.search import compare
from sparge_kernels import reference

DENSITY_SLACK = 0.02  # rounding decides tiles at the limit: a few in a hundred


@contextmanager
def one_thread() -> Iterator[None]:
    """For small tensors in plain torch: on a busy machine threads that wait for each other take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Call:
    """q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], mask [B, Hq, Sq, Sk]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Answer:
    """density: share of the visible tiles that were computed, the mean over batch and heads."""

    output: Tensor
    density: float


@dataclass(frozen=True)
class Case:
    """One call. Lengths are no multiples of a tile; q, k and v are views [B, S, H, D] of projections, transposed.

    bound: the largest relative L1 to the answer that is right. mask: another one for each batch entry and head, and
    the first query sees nothing by "bool"; "causal float": -inf above the diagonal too.
    numbers: "random", of which all tiles are computed; "planted": 256 tokens, each query tile of which sees two of
    four key tiles, which are computed; "smooth": a field, contiguous, at the default thresholds.
    """

    name: str
    bound: float = 2e-2
    dtype: torch.dtype = torch.float32
    precision: str = "int8"
    is_causal: bool = False
    mask: Literal["bool", "float", "causal float"] | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 300
    keys: int = 300
    head_dim: int = 40
    scale: float | None = None
    numbers: Literal["random", "planted", "smooth"] = "random"

    @property
    def is_default(self) -> bool:
        """At the default thresholds: dense attention is no answer, the specification is."""
        return self.numbers == "smooth"

    @property
    def choice(self) -> Choice:
        """The tiles to compute."""
        if self.is_default:
            return of_policy("default", Policy(), self.is_causal, None)
        return share(0.5) if self.numbers == "planted" else ALL_TILES

    @property
    def options(self) -> dict[str, Any]:
        """Of dense attention."""
        return {"is_causal": self.is_causal, "scale": self.scale, "enable_gqa": self.heads != self.kv_heads}

    @property
    def sparse_options(self) -> dict[str, Any]:
        """Of every kernel of this project, beside the thresholds."""
        return {**self.options, "precision": self.precision, "predictor": self.choice.predictor}

    @one_thread()
    def call(self, device: torch.device) -> Call:
        """The same numbers on every device."""
        numbers = self._smooth() if self.is_default else self._random()
        q, k, v = (x.to(device, self.dtype) for x in numbers)
        mask = self._mask()
        if mask is not None:
            mask = mask.to(device, torch.bool if mask.dtype == torch.bool else self.dtype)
        return Call(q, k, v, mask)

    def _smooth(self) -> tuple[Tensor, Tensor, Tensor]:
        options: dict[str, Any] = {"precision": self.precision, "dtype": self.dtype, "kv_heads": self.kv_heads}
        return smooth_problem(self.keys, self.heads, self.head_dim, is_causal=self.is_causal, **options).inputs

    def _random(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        sizes = ((self.queries, self.heads), *((self.keys, self.kv_heads),) * 2)
        q, k, v = (torch.randn(self.batch, *size, self.head_dim, generator=generator).transpose(1, 2) for size in sizes)
        if self.numbers == "planted":
            kinds = torch.eye(self.head_dim)[:2].repeat_interleave(128, dim=0)  # one direction for each query tile
            q, k = (14 * kinds + x / 10 for x in (q, k))  # scores of 31 and 0
        return q, k, v

    def _mask(self) -> Tensor | None:
        if self.mask is None:
            return None
        generator = torch.Generator().manual_seed(1)
        numbers = torch.randn(self.batch, self.heads, self.queries, self.keys, generator=generator)
        if self.mask == "bool":
            seen = numbers < 0
            seen[:, :, 0] = False
            return seen
        hidden = torch.ones(self.queries, self.keys).triu(1) > 0
        return numbers.masked_fill(hidden, -torch.inf) if self.mask == "causal float" else numbers


# One line for each way to be wrong that a user would not see: a kernel that drops its scale or its mask, or mixes up
# its heads, is wrong in one of them.
CASES = (
    Case("plain"),
    Case("unquantized", bound=1e-4, precision="none"),
    Case("causal", is_causal=True),
    Case("bool mask", mask="bool", batch=2),
    Case("float mask", mask="float", queries=200, keys=333),
    Case("causal float mask", mask="causal float"),
    Case("grouped heads and a scale", bound=3e-2, heads=4, scale=0.3),
    Case("fewer queries than keys, causal", is_causal=True, queries=200, keys=333),
    Case("more queries than keys", batch=2, queries=333, keys=200),
    Case("bf16", dtype=torch.bfloat16, is_causal=True),
    Case("fp16, 128 dimensions", dtype=torch.float16, head_dim=128),
    Case("half of the tiles", numbers="planted", queries=256, keys=256),
    Case("default thresholds", numbers="smooth", queries=1100, keys=1100, head_dim=64),
    Case("default thresholds, causal", is_causal=True, numbers="smooth", queries=1100, keys=1100),
)
COMPILED = (
    Case("causal, grouped heads and a scale", is_causal=True, batch=2, heads=4, scale=0.3),
    Case("float mask in bf16", mask="float", dtype=torch.bfloat16, queries=200, keys=333),
)


@functools.cache
@one_thread()
@torch.no_grad()
def answer(case: Case, device: torch.device) -> Answer:
    """What is right: dense attention in fp64 over the tiles that count; at the default thresholds the specification."""
    call = case.call(device)
    if case.is_default:
        return by_reference(case, call)
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    mask = call.mask if call.mask is None or call.mask.dtype == torch.bool else call.mask.double()
    return Answer(F.scaled_dot_product_attention(q, k, v, mask, **case.options), case.choice.density or 1.0)


@one_thread()
def by_reference(case: Case, call: Call) -> Answer:
    """The specification."""
    thresholds, options = [case.choice.thresholds], case.sparse_options
    done = reference.attention(call.q, call.k, call.v, thresholds=thresholds, attn_mask=call.mask, **options)
    return Answer(done.output, float(done.density.mean()))


def fault(case: Case, found: Answer, right: Answer) -> str | None:
    """What is wrong with an answer, in words; None if it is right."""
    error, to = relative_l1(found, right), "the reference" if case.is_default else "dense fp64"
    if not error <= case.bound:
        return f"WRONG NUMBERS, relative L1 {error:.2g} to {to}, allowed is {case.bound:g}"
    # An error in a row of many does not show in the mean. Rows of zeros on both sides count as equal.
    worst = float(compare(found.output, right.output)[2].min())
    if not worst >= LEAST_COSINE:
        return f"WRONG ROW, its cosine to {to} is {worst:.3g}, allowed is {LEAST_COSINE:g} or more"
    if not abs(found.density - right.density) <= DENSITY_SLACK:
        return f"WRONG TILES, {found.density:.1%} of them are computed, right is {right.density:.1%}"
    return None


def relative_l1(found: Answer, right: Answer) -> float:
    expected = right.output.double()
    return float((found.output.double() - expected).abs().sum() / expected.abs().sum())
