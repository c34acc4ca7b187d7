"""Calls that every build of the native kernel must answer as the reference does, and what running one takes."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from kernel_cases import DEFAULT, HALF, KEEP_ALL, LAYOUTS, random_qkv
from mask_cases import MASKS
from torch import Tensor

from sparge_kernels import reference
from sparge_kernels.cpu import native
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, K_TILE, PREDICTORS, Q_TILE, Thresholds
from sparge_kernels.tiles import tile_count

INF, NAN = float("inf"), float("nan")
HALF_OF_THE_MASS = Thresholds(topk=None, cdf=0.5, similarity=-1.0, pv=None)
SKIPPING = Thresholds(topk=1.0, cdf=1.0, similarity=-1.0, pv=-0.3)
UNTOUCHED = 7.0  # what lies between the rows of an output
# An INT8 code may move by one; where weights and values are bf16, the error is theirs.
TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BF16_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Case:
    q_len: int
    k_len: int
    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    dim: int = 40
    value_dim: int = 24
    dtype: torch.dtype = torch.float32
    precision: str = "int8"
    predictor: str = DEFAULT_PREDICTOR
    is_causal: bool = False
    mask: str | None = None
    thresholds: Thresholds = HALF
    layout: str = "contiguous"
    spoiled: str | None = None
    gain: float = 1.0
    threads: int = 1


@dataclass(frozen=True)
class Result:
    output: Tensor
    density: Tensor
    pv_skipped: Tensor
    kept: Tensor


def _spoil_queries(q: Tensor, k: Tensor, v: Tensor) -> None:
    for row, number in ((5, INF), (6, -INF), (7, NAN), (70, 1e-42)):
        q[:, :, row % q.shape[2]] = number


def _spoil_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[:, :, 100 % k.shape[2], 0], k[:, 0, -1, -1] = INF, NAN


def _spoil_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    for row, channel, number in ((0, 0, INF), (100, -1, -INF), (200, 1, NAN), (-1, -1, INF)):
        v[:, :, row % v.shape[2], channel % v.shape[3]] = number


SPOILS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "queries": _spoil_queries,
    "keys": _spoil_keys,
    "values": _spoil_values,
}
NAMED = {
    "fp32": Case(300, 400),
    "fp32-none": Case(300, 400, precision="none"),
    "bf16": Case(300, 400, dtype=torch.bfloat16),
    "bf16-none": Case(300, 400, dtype=torch.bfloat16, precision="none"),
    "fp16": Case(300, 400, dtype=torch.float16),
    "fp16-none": Case(300, 400, dtype=torch.float16, precision="none"),
    "causal": Case(300, 333, is_causal=True, thresholds=HALF_OF_THE_MASS),
    "causal-none": Case(333, 300, is_causal=True, precision="none"),
    "sparge": Case(300, 400, predictor="sparge"),
    "sparge-causal": Case(300, 333, predictor="sparge", is_causal=True, thresholds=HALF_OF_THE_MASS),
    "keep-all": Case(130, 200, thresholds=KEEP_ALL, threads=2),
    "default-thresholds": Case(200, 500, thresholds=DEFAULT, batch=2),
    "gqa": Case(140, 260, heads=6, kv_heads=2, batch=2, dim=64, value_dim=64, threads=3),
    "one-channel": Case(129, 193, dim=1, value_dim=1, layout="tokens-before-heads"),
    "odd-channels": Case(129, 193, dim=17, value_dim=33, layout="sliced-with-offset"),
    "most-channels": Case(129, 193, dim=256, value_dim=255, layout="last-dim-not-contiguous"),
    "many-heads": Case(20, 70, batch=2, heads=40, kv_heads=20, dim=8, value_dim=8, spoiled="keys"),
    "skips": Case(3, 1200, gain=6.0, thresholds=SKIPPING),
    "skips-none": Case(3, 1200, gain=6.0, thresholds=SKIPPING, precision="none"),
    **{f"{name}-not-finite": Case(300, 333, spoiled=name) for name in SPOILS},
    **{f"{name}-not-finite-causal": Case(300, 333, spoiled=name, is_causal=True) for name in SPOILS},
    **{f"{name}-not-finite-bf16": Case(300, 333, spoiled=name, dtype=torch.bfloat16) for name in SPOILS},
    **{f"{name}-not-finite-none": Case(300, 333, spoiled=name, precision="none") for name in SPOILS},
    **{f"{name}-not-finite-mask": Case(200, 333, spoiled=name, mask="minus-inf-rows") for name in SPOILS},
    **{f"mask-{name}": Case(200, 333, mask=name, batch=2) for name in MASKS},
}


def odd_cases(count: int = 120, seed: int = 0) -> Iterator[Case]:
    """Sizes around whole tiles and vectors, with everything else mixed in."""
    pick = random.Random(seed).choice
    lengths, dims = (1, 2, 15, 63, 64, 65, 66, 127, 128, 129, 130), (1, 3, 16, 40, 255, 256)
    for number in range(count):
        case = Case(pick(lengths), pick(lengths), dim=pick(dims), value_dim=pick(dims), batch=pick((1, 2)))
        case = replace(case, predictor=PREDICTORS[number % len(PREDICTORS)])
        case = replace(case, dtype=pick(list(TOLERANCE)), precision=pick(("int8", "none")), layout=pick(list(LAYOUTS)))
        case = replace(case, threads=pick((1, 3)), thresholds=pick((HALF, HALF_OF_THE_MASS, DEFAULT, SKIPPING)))
        case = replace(case, is_causal=pick((False, True)), kv_heads=pick((1, 2)), spoiled=pick((None, None, *SPOILS)))
        if case.layout == "one-token-expanded":  # equal tiles: rounding ranks them
            case = replace(case, thresholds=KEEP_ALL)
        yield case if case.is_causal else replace(case, mask=pick((None, *MASKS)))


ODD = tuple(odd_cases())


@functools.cache
def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    sizes = {name: getattr(case, name) for name in ("heads", "kv_heads", "batch", "dim", "value_dim")}
    q, k, v = random_qkv(case.q_len, case.k_len, **sizes)
    q = q * case.gain
    if case.spoiled:
        SPOILS[case.spoiled](q, k, v)
    q, k, v = (LAYOUTS[case.layout](x.to(case.dtype)) for x in (q, k, v))
    mask = MASKS[case.mask](case.batch, case.heads, case.q_len, case.k_len) if case.mask else None
    return q, k, v, mask.to(case.dtype) if mask is not None and mask.is_floating_point() else mask


@functools.cache
def expected(case: Case) -> Result:
    q, k, v, mask = inputs(case)
    options = {"attn_mask": mask, "is_causal": case.is_causal, "precision": case.precision, "enable_gqa": True}
    options["predictor"] = case.predictor
    result = reference.attention(q, k, v, thresholds=[case.thresholds], scale=case.dim**-0.5, **options)
    return Result(result.output, result.density, result.pv_skipped, result.kept)


def assert_expected(actual: Result, case: Case, *, bf16: bool) -> None:
    wanted = expected(case)
    assert torch.equal(actual.kept, wanted.kept), case
    assert torch.equal(actual.density, wanted.density), case
    if case.spoiled in (None, "values"):  # a tile whose rows are all NaN may be skipped or not
        torch.testing.assert_close(actual.pv_skipped, wanted.pv_skipped, msg=lambda said: f"{case}: {said}")
    tolerance = BF16_TOLERANCE if bf16 and case.precision == "int8" else TOLERANCE[case.dtype]
    options = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(actual.output, wanted.output, msg=lambda said: f"{case}: {said}", **options)


def new_output(case: Case) -> Tensor:
    plain = torch.full((case.batch, case.heads, case.q_len, case.value_dim), UNTOUCHED, dtype=case.dtype)
    out = LAYOUTS["contiguous" if "expanded" in case.layout else case.layout](plain)
    elements(out).fill_(UNTOUCHED)
    return out


def elements(x: Tensor) -> Tensor:
    """All of x's storage from its first element to its last, [n]."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((last + 1,), (1,))


def kernel_options(case: Case, out: Tensor) -> dict[str, object]:
    choice = {"precision": case.precision, "predictor": case.predictor}
    return {"is_causal": case.is_causal, "scale": case.dim**-0.5, **choice, "out": out}


def tiles(case: Case) -> tuple[int, int]:
    return tile_count(case.q_len, Q_TILE), tile_count(case.k_len, K_TILE)


def run_library(library, case: Case) -> Result:
    torch.set_num_threads(case.threads)
    q, k, v, mask = inputs(case)
    out, kept = new_output(case), torch.empty(case.batch, case.heads, *tiles(case), dtype=torch.bool)
    options = kernel_options(case, out) | {"thresholds": [case.thresholds] * case.heads, "attn_mask": mask}
    return Result(out, *native.attention(q, k, v, kept=kept, using=library, **options), kept)
