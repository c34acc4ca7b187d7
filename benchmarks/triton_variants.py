"""The calls of the Triton kernels whose compilation is checked: those that differ in code and that users make."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparge_kernels import triton
from sparge_kernels.thresholds import DEFAULT_PREDICTOR, NEVER_SKIP, Thresholds

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
_BATCH, _KV_HEADS = 2, 4


@dataclass(frozen=True)
class Variant:
    """One call. mask: None, torch.bool or the dtype of a float mask. core: part of what CI compiles."""

    dtype: torch.dtype = BFLOAT16
    dim: int = 128
    value_dim: int | None = None
    precision: str = "int8"
    predictor: str = DEFAULT_PREDICTOR
    causal: bool = False
    mask: torch.dtype | None = None
    skips: bool = True  # stage 2
    lse: bool = False
    group: int = 1  # query heads of a kv head
    strided: bool = False  # no dimension of Q, K, V and the output is contiguous
    tokens: int = 4096
    core: bool = False


VARIANTS = {
    "bf16 d128": Variant(core=True),
    "bf16 d128 causal gqa lse": Variant(causal=True, group=4, lse=True, core=True),
    "bf16 d128 sparge causal gqa": Variant(predictor="sparge", causal=True, group=4),
    "bf16 d128 stage 1 only": Variant(skips=False),
    "bf16 d128 unquantized": Variant(precision="none"),
    "bf16 d128 bool mask": Variant(mask=torch.bool),
    "bf16 d128 float mask": Variant(mask=BFLOAT16, core=True),
    "bf16 d128 sparge float mask": Variant(predictor="sparge", mask=BFLOAT16),
    "bf16 d128 strided": Variant(strided=True),
    "fp16 d64": Variant(FLOAT16, 64, core=True),
    "fp16 d64 causal stage 1 only": Variant(FLOAT16, 64, causal=True, skips=False),
    "fp16 d64 unquantized causal": Variant(FLOAT16, 64, precision="none", causal=True),
    "fp16 d64 bool mask lse": Variant(FLOAT16, 64, mask=torch.bool, lse=True),
    "fp16 d64 value 128 causal": Variant(FLOAT16, 64, value_dim=128, causal=True),
    "fp32 d64": Variant(FLOAT32, 64),
    "fp32 d64 unquantized float mask": Variant(FLOAT32, 64, precision="none", mask=FLOAT32),
    "fp32 d128 causal": Variant(FLOAT32, 128, causal=True),
    "fp32 d128 unquantized": Variant(FLOAT32, 128, precision="none"),
    "fp16 d16": Variant(FLOAT16, 16),
    "bf16 d40 causal": Variant(dim=40, causal=True),
    "fp16 d72": Variant(FLOAT16, 72),
    "bf16 d96 causal": Variant(dim=96, causal=True),
    "bf16 d256 causal": Variant(dim=256, causal=True),
    "fp16 d256 unquantized": Variant(FLOAT16, 256, precision="none"),
    "fp32 d256 float mask": Variant(FLOAT32, 256, mask=FLOAT32),
    "bf16 d64 most keys": Variant(dim=64, tokens=triton.MAX_KEYS),
    "bf16 d64 sparge most keys": Variant(dim=64, predictor="sparge", tokens=triton.MAX_KEYS),
}


def call(variant: Variant) -> None:
    """The whole operator on tensors without data: every launch goes through launch.run."""
    heads, value_dim = _KV_HEADS * variant.group, variant.value_dim or variant.dim
    pv = None if variant.skips else NEVER_SKIP
    triton.attention(
        _inputs(variant, heads, variant.dim),
        _inputs(variant, _KV_HEADS, variant.dim),
        _inputs(variant, _KV_HEADS, value_dim),
        thresholds=[Thresholds(topk=None, cdf=0.9, similarity=0.5, pv=pv)] * heads,
        attn_mask=None if variant.mask is None else _new(1, 1, variant.tokens, variant.tokens, dtype=variant.mask),
        is_causal=variant.causal,
        scale=variant.dim**-0.5,
        precision=variant.precision,
        predictor=variant.predictor,
        out=_inputs(variant, heads, value_dim),
        lse=_new(_BATCH, heads, variant.tokens, dtype=FLOAT32) if variant.lse else None,
    )


def _inputs(variant: Variant, heads: int, dim: int) -> Tensor:
    x = _new(_BATCH, heads, variant.tokens, 2 * dim if variant.strided else dim, dtype=variant.dtype)
    return x[..., ::2] if variant.strided else x


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
