"""What the kernel tests share: all kernels behind one signature, dense truth, odd layouts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparge_kernels import cpu, ops, reference
from sparge_kernels.thresholds import NEVER_SKIP, PREDICTORS, Thresholds, pack

KEEP_ALL = Thresholds(topk=1.0, cdf=1.0, similarity=-1.0, pv=NEVER_SKIP)
DEFAULT = Thresholds(topk=None, cdf=0.98, similarity=0.5, pv=None)
HALF = Thresholds(topk=0.5, cdf=1.0, similarity=-1.0, pv=-2.0)

assert ops  # importing it registers the operator


@dataclass(frozen=True)
class Result:
    """Output and statistics, from any implementation."""

    output: Tensor
    density: Tensor
    pv_skipped: Tensor


Kernel = Callable[..., Result]


def run_reference(q: Tensor, k: Tensor, v: Tensor, thresholds: Sequence[Thresholds], **kwargs: object) -> Result:
    result = reference.attention(q, k, v, thresholds=thresholds, enable_gqa=True, **kwargs)
    return Result(result.output, result.density, result.pv_skipped)


def run_shared(q: Tensor, k: Tensor, v: Tensor, thresholds: Sequence[Thresholds], **kwargs: object) -> Result:
    """The reference as the GPU kernels follow it."""
    return run_reference(q, k, v, thresholds, centring="call", **kwargs)


def run_triton(q: Tensor, k: Tensor, v: Tensor, thresholds: Sequence[Thresholds], **kwargs: object) -> Result:
    """The GPU kernels: on a GPU where there is one, else in Triton's interpreter."""
    if torch.cuda.is_available():
        tensors = {name: on_gpu(x) for name, x in kwargs.items() if isinstance(x, Tensor)}
        result = run_native(*map(on_gpu, (q, k, v)), thresholds, **{**kwargs, **tensors})
        return Result(result.output.cpu(), result.density.cpu(), result.pv_skipped.cpu())
    with mock.patch.dict(os.environ, {cpu.KERNEL_VARIABLE: "interpreted"}):
        if reason := ops.unavailable(q.device):
            pytest.skip(reason)
        return run_native(q, k, v, thresholds, **kwargs)


def on_gpu(x: Tensor) -> Tensor:
    """A copy of the whole storage and the same view of it: strides, offset and neighbours as they were."""
    if x.is_neg() or x.is_conj():
        return x.cuda()
    stored = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((stored,), (1,), 0).cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def run_native(q: Tensor, k: Tensor, v: Tensor, thresholds: Sequence[Thresholds], **kwargs: object) -> Result:
    operator = torch.ops.sparge.attention_with_stats.default
    return Result(*operator(q, k, v, thresholds=pack(thresholds), enable_gqa=True, **kwargs))


def run_blocked(q: Tensor, k: Tensor, v: Tensor, thresholds: Sequence[Thresholds], **kwargs: object) -> Result:
    with blocked_kernel():
        return run_native(q, k, v, thresholds, **kwargs)


@contextmanager
def blocked_kernel() -> Iterator[None]:
    """The operator runs the blocked kernel inside."""
    with mock.patch.dict(os.environ, {cpu.KERNEL_VARIABLE: "blocked"}):
        yield


KERNELS: dict[str, Kernel] = {
    "reference": run_reference,
    "reference-shared": run_shared,
    "blocked": run_blocked,
    "native": run_native,
    "triton": run_triton,
}


SHARING = (run_shared, run_triton)
"""Kernels that centre all K tiles of a head by one vector."""


def kernels(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kernel", [KERNELS[name] for name in names], ids=names)


cpu_kernels = kernels("blocked", "native")
masking_kernels = kernels("reference", "reference-shared", "native", "triton")
both_causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
both_precisions = pytest.mark.parametrize("precision", ["int8", "none"])
every_predictor = pytest.mark.parametrize("predictor", PREDICTORS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """fp64 SDPA; causal through a mask, because CPU SDPA is wrong for is_causal with a negative scale.

    The math kernel, because the CPU flash kernel gives 0 for a NaN row when there are very few keys.
    `dtype`: fp32 where rounding is part of the answer, as -1e9 + score is -1e9.
    """
    if is_causal:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(dtype)
    wide = (x.to(dtype) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*wide, attn_mask=attn_mask, scale=scale, enable_gqa=True)


def relative_l1(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected.double()).abs().sum() / expected.double().abs().sum())


def kernel_error(kernel: Kernel, dtype: torch.dtype, precision: str = "int8") -> float:
    """Most a kernel's output may err before its last rounding, as a share of the same attention over |V|.

    The native and the GPU kernels round weights to bf16 (2^-8 each) if the scores are INT8 or the inputs bf16, and with
    them the values; the GPU kernels round the weights of fp16 inputs to fp16. The rest is fp32 rounding of scores and
    sums; 2^-11 more allows for an INT8 code that it moves by one.
    """
    if kernel is run_triton and dtype == torch.float16:
        return 2**-10
    if kernel not in (run_native, run_triton) or (precision == "none" and dtype != torch.bfloat16):
        return 2e-5
    truncates = kernel is run_triton and not torch.cuda.is_available()  # Triton's interpreter does, where GPUs round
    return 2**-8 * (1 if dtype == torch.bfloat16 else 2) * (2 if truncates else 1) + 2**-11


def random_qkv(
    q_len: int,
    k_len: int,
    *,
    heads: int = 2,
    kv_heads: int | None = None,
    batch: int = 1,
    dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kv_heads, value_dim = kv_heads or heads, value_dim or dim
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, value_dim))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def _sliced(x: Tensor) -> Tensor:
    return x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 2), torch.nan)[:, :, 1:-2, 2:].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "tokens-before-heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last-dim-not-contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced-with-offset": _sliced,
    "one-head-expanded": lambda x: x[:, :1].expand_as(x),
    "one-token-expanded": lambda x: x[:, :, :1].expand_as(x),
}
